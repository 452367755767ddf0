"""A scripted OpenAI server for client tests: each request is answered by the script that its prompt names."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Call:
    """One request as the server saw it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    async def start(self, status: str = "200 OK", *extra: str) -> None:
        """Send a response head that ends with the connection."""
        head = "\r\n".join([f"HTTP/1.1 {status}", "Content-Type: text/event-stream", "Connection: close", *extra])
        self.writer.write(head.encode() + b"\r\n\r\n")
        await self.writer.drain()

    async def event(self, payload: object, end: str = "\n\n") -> None:
        """Send one event."""
        text = payload if isinstance(payload, str) else json.dumps(payload)
        self.writer.write(f"data: {text}{end}".encode())
        await self.writer.drain()


Script = Callable[[Call], Awaitable[None]]


@dataclass(slots=True)
class SseServer:
    """What a test gets: where the server is and what reached it."""

    port: int = 0
    calls: list[Call] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)  # of the next questions for the models, in place of 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def sse_server(
    scripts: Mapping[str, Script], version: str | None = None, port: int = 0
) -> AsyncIterator[SseServer]:
    """Serve until the block ends; ``version`` makes it look like a vLLM of that version."""
    server = SseServer()
    connections: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await _answer(reader, writer, scripts, version, server)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            connections.discard(task)
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", port)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _answer(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    scripts: Mapping[str, Script],
    version: str | None,
    server: SseServer,
) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    request_line, *lines = head.strip().split("\r\n")
    method, path, _ = request_line.split(" ")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if method == "GET":
        known = {"/v1/models": {"data": [{"id": "tiny"}]}} | ({"/version": {"version": version}} if version else {})
        body = json.dumps(known.get(path, {})).encode()
        status = "200 OK" if path in known else "404 Not Found"
        if path == "/v1/models" and server.statuses:
            status = server.statuses.pop(0)
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        return
    raw = await reader.readexactly(int(headers["content-length"]))
    call = Call(path, headers, json.loads(raw), writer)
    server.calls.append(call)
    prompt = call.body["messages"][0]["content"] if "messages" in call.body else call.body["prompt"]
    await scripts[prompt](call)


def chat_chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    """A chunk of a chat answer."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The usage member of a chunk."""
    return {"usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


class AnyPrompt(dict[str, Script]):
    """Answers every prompt with ``max_tokens`` tokens, counting five characters as a token.

    Args:
        dies_after: requests after which every further one finds the connection closed.
    """

    def __init__(self, dies_after: int | None = None) -> None:
        super().__init__()
        self._left = dies_after

    def __missing__(self, prompt: str) -> Script:
        if self._left is not None:
            self._left -= 1

        async def answer(call: Call) -> None:
            if self._left is not None and self._left < 0:
                call.writer.transport.abort()
                return
            await call.start("200 OK", f"x-slo-class: {call.headers.get('x-slo-class', 'none')}")
            for count in range(1, int(call.body["max_tokens"]) + 1):
                await call.event(chat_chunk("x") | usage(len(prompt) // 5, count))
            await call.event("[DONE]")

        return answer


@contextmanager
def served(dies_after: int | None = None, port: int = 0) -> Iterator[SseServer]:
    """A scripted server in a thread of its own, for code that runs its own event loop."""
    ready, ended = threading.Event(), threading.Event()
    found: list[SseServer] = []

    async def serve() -> None:
        async with sse_server(AnyPrompt(dies_after), "0.32.0", port) as server:
            found.append(server)
            ready.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait(10.0)
    try:
        yield found[0]
    finally:
        ended.set()
        thread.join()
