"""One judged request on the wire: the answer's head says the verdict, a refusal takes the place of vLLM's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from slos_serve.vllm_plugin.asgi import Message, Send
from slos_serve.vllm_plugin.front.answers import refusal, verdict_headers, with_measured
from slos_serve.vllm_plugin.front.client import CURRENT, RefusedError
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.judged import Judged

Serve = Callable[[Send], Awaitable[None]]


async def judged_exchange(
    front: FrontDesk,
    judged: Judged,
    announced: Iterable[tuple[bytes, bytes]],
    serve: Serve,
    send: Send,
) -> None:
    """Serve one request and tell its client what was decided.

    Args:
        front: judges it when vLLM hands it to the engine.
        judged: what ``front`` began for it.
        announced: headers of an answer, before the verdict.
        serve: runs the application with the ``send`` it is given.
        send: of the connection.
    """
    answer = _Answer(front, judged, list(announced), send)
    token = CURRENT.set(judged)
    try:
        await serve(answer.send)
    except RefusedError:
        if judged.refusal is None:
            raise
    finally:
        CURRENT.reset(token)
        front.ended(judged)  # first: whatever becomes of the head, room is given back
        await answer.wait_no_more()
    await answer.refuse_if_due()


class _Answer:
    """What goes out for one request."""

    def __init__(self, front: FrontDesk, judged: Judged, announced: list[tuple[bytes, bytes]], send: Send) -> None:
        self.judged = judged
        self._front = front
        self._announced = announced
        self._send = send
        self._streams = False
        self._refused = False
        # Sends the head while it waits, see `open_promises`.
        self._sender: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        """What the application says; dropped once the request is refused."""
        if self.judged.refusal is not None:
            await self.refuse_if_due()
        elif message["type"] == "http.response.start":
            await self._begin(message)
        else:
            if self._sender is not None:
                await self._front.last_word(self.judged)
                await self.wait_no_more()
            is_part = message["type"] == "http.response.body" and self._streams and message.get("body")
            await self._send(self._part(message) if is_part else message)

    async def refuse_if_due(self) -> None:
        """Send the refusal, once."""
        if self.judged.refusal is None or self._refused:
            return
        self._refused = True
        status, headers, body = refusal(self.judged)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def wait_no_more(self) -> None:
        """Send the head now if it waits; returns when it is out."""
        self.judged.decided.set()
        if self._sender is not None:
            sender, self._sender = self._sender, None
            await sender

    async def _begin(self, message: Message) -> None:
        headers = message.get("headers", ())
        self._streams = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
        )
        if self._streams and self.judged.open and message["status"] < 400:
            self._sender = asyncio.create_task(self._send_later(message))
        else:
            await self._front.last_word(self.judged)
            self._front.said(self.judged)
            await self._send(self._head(message))

    async def _send_later(self, message: Message) -> None:
        await self._front.settled(self.judged)
        self._front.said(self.judged)
        await self._send(self._head(message))

    def _head(self, message: Message) -> Message:
        headers = message.get("headers", ())
        if message["status"] >= 400:
            return message
        return {**message, "headers": [*headers, *self._announced, *verdict_headers(self.judged)]}

    def _part(self, message: Message) -> Message:
        judged, part = self.judged, bytes(message["body"])
        if judged.first_s is None:
            self._front.first_token(judged)
        changed = with_measured(part, judged)
        if changed is part and not part.startswith(b"data: [DONE]"):
            judged.last_s = self._front.now_s()
        return {**message, "body": changed}
