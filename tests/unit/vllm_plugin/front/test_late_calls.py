"""Calls of the engine that come when nothing can be said of them any more: the head is out, or the first call runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from slos_serve.vllm_plugin.asgi import Message, Send
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.exchange import judged_exchange
from slos_serve.vllm_plugin.front.mirror import ENGINE
from tests.builders import EngineBuilder
from tests.unit.routing.fleet import loaded
from tests.unit.vllm_plugin.front.builders import Server, desk
from tests.unit.vllm_plugin.front.test_open_promises import PROMPT_TOKENS, crowded

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def start(headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def call(server: Server, slo_class: str, name: str, tokens: int = PROMPT_TOKENS) -> None:
    """One call of the engine, as vLLM makes it."""
    params = SimpleNamespace(extra_args={"slo_class": slo_class}, max_tokens=100, n=1)
    server.client.generate({"type": "token", "prompt_token_ids": [1] * tokens}, params, name)


def counted(front: FrontDesk, slo_class: str) -> float:
    """Verdicts in the metrics."""
    return sum(
        sample.value
        for family in front.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "slos_serve:answers_total" and sample.labels["slo_class"] == slo_class
    )


@pytest.mark.parametrize("slo_class", ["strict", "chat"])
async def test_a_call_after_the_head_is_neither_refused_nor_waited_for(tmp_path: Path, slo_class: str) -> None:
    """As the streams of ``/v1/responses``, which begin before the engine is asked."""
    front = desk(tmp_path, crowded())
    server, sent = Server(front), list[Message]()

    async def send(message: Message) -> None:
        sent.append(message)

    async def serve(out: Send) -> None:
        await out(start(STREAM))
        await out({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        call(server, slo_class, "resp_1_0")
        await out({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    await judged_exchange(front, front.begin(front.version.classes.classes[slo_class]), [], serve, send)
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 2]
    assert b"".join(message["body"] for message in sent[1:]).endswith(b"data: [DONE]\n\n")
    assert server.client.taken == ["resp_1_0"] and counted(front, slo_class) == 0.0


async def test_a_call_after_the_exchange_leaves_nothing_behind(tmp_path: Path) -> None:
    """As ``background: true`` of ``/v1/responses``: the answer is out, and its task calls the engine later."""
    front = desk(tmp_path, crowded())
    server, tasks = Server(front), list["asyncio.Task[None]"]()

    async def later() -> None:
        await asyncio.sleep(0.0)
        call(server, "chat", "resp_1_0")

    async def send(_: Message) -> None:
        return

    async def serve(out: Send) -> None:
        tasks.append(asyncio.create_task(later()))
        await out(start([(b"content-type", b"application/json")]))
        await out({"type": "http.response.body", "body": b"{}"})

    await judged_exchange(front, front.begin(front.version.classes.classes["chat"]), [], serve, send)
    await asyncio.gather(*tasks)
    assert server.client.taken == ["resp_1_0"]
    assert not front._open._by_ticket and counted(front, "chat") == 0.0
    assert front._mirror._mirrors.in_flight(ENGINE) == 1, "whoever asks next is told with it in mind"


@pytest.mark.parametrize("engine", [loaded(0), crowded()])
async def test_of_an_exchange_whose_first_call_runs_no_later_one_is_told(tmp_path: Path, engine: EngineBuilder) -> None:
    """As beam search, with a call for each beam and token, and as turns after a tool call."""
    front = desk(tmp_path, engine)
    server, sent = Server(front), list[Message]()

    async def send(message: Message) -> None:
        sent.append(message)

    async def serve(out: Send) -> None:
        for step in range(30):
            for beam in range(4):
                call(server, "chat", f"cmpl-1-{step}-beam-{beam}", tokens=200)
            await asyncio.sleep(0.0)
        await out(start([(b"content-type", b"application/json")]))
        await out({"type": "http.response.body", "body": b"{}"})

    await judged_exchange(front, front.begin(front.version.classes.classes["chat"]), [], serve, send)
    assert len(server.client.taken) == 120 and counted(front, "chat") == 4.0
    assert front._mirror._mirrors.in_flight(ENGINE) == 0


async def test_what_was_let_in_is_not_refused_half_way(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    server, sent = Server(front), list[Message]()

    async def send(message: Message) -> None:
        sent.append(message)

    async def serve(out: Send) -> None:
        call(server, "strict", "resp_1_0", tokens=200)
        await asyncio.sleep(0.0)
        full = json.dumps(_full()).encode()
        front.heard(full, is_state=True)
        call(server, "strict", "resp_1_1")
        await out(start([(b"content-type", b"application/json")]))
        await out({"type": "http.response.body", "body": b"{}"})

    await judged_exchange(front, front.begin(front.version.classes.classes["strict"]), [], serve, send)
    assert sent[0]["status"] == 200 and server.client.taken == ["resp_1_0", "resp_1_1"]
    status, headers, _ = await server.ask("strict", prompt_tokens=PROMPT_TOKENS)
    assert (status, headers["x-slo-verdict"]) == (429, "rejected"), "a new one would have been"


def _full() -> dict[str, object]:
    from tests.unit.routing.fleet import NOW_S, published  # noqa: PLC0415

    return published(crowded(), sequence=1, time_s=NOW_S + 0.1).as_dict()
