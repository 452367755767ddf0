"""Heads that wait while the engine may still promise something, and what ends the wait."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slos_serve.vllm_plugin.asgi import Message, Send
from slos_serve.vllm_plugin.front import open_promises
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.exchange import judged_exchange
from slos_serve.vllm_plugin.front.mirror import ENGINE
from slos_serve.vllm_plugin.front.open_promises import OpenPromises
from tests.builders import EngineBuilder
from tests.unit.routing.fleet import loaded
from tests.unit.vllm_plugin.front.builders import Server, Told, desk

PROMPT_TOKENS = 3900


def crowded() -> EngineBuilder:
    """Prompts that leave no time for one of ``PROMPT_TOKENS`` now."""
    engine = loaded(0)
    for _ in range(8):
        engine.wait(1500, due_in_s=1.0)
    return engine


async def waiting(server: Server, slo_class: str = "chat", **given: Any) -> asyncio.Task[Told]:
    """A request that is promised nothing as it comes; its engine has it."""
    server.client.goes_on.clear()
    asked = asyncio.ensure_future(server.ask(slo_class, prompt_tokens=PROMPT_TOKENS, **given))
    for _ in range(3):
        await asyncio.sleep(0.0)
    return asked


def promised(front: FrontDesk, *made: tuple[int, int]) -> None:
    """The engine says that it made promises: ticket and rank of each."""
    front.heard(json.dumps({"promised": made}).encode(), is_state=False)


def answered(front: FrontDesk, verdict: str, reason: str) -> float | None:
    labels = {"model_name": "m", "engine": "0", "slo_class": "chat", "verdict": verdict, "reason": reason}
    return front.metrics.registry.get_sample_value("slos_serve:answers_total", labels)


async def test_a_promise_that_is_made_before_the_answer_begins_is_told(tmp_path: Path) -> None:
    server = Server(desk(tmp_path, crowded()))
    asked = await waiting(server)
    assert answered(server.front, "best-effort", "ttft_too_late") is None, "nothing is told yet"
    promised(server.front, (1, 0))
    await asyncio.sleep(0.01)
    server.client.goes_on.set()
    _, headers, body = await asked
    assert (headers["x-slo-verdict"], headers["x-slo-reason"]) == ("admitted", "fits")
    assert headers["x-slo-target-ttft-ms"] == "1000" and b'"verdict":"admitted"' in body
    assert answered(server.front, "admitted", "fits") == 1.0
    server.front.heard(
        json.dumps({"request_id": "cmpl-1-0", "finished": "stop", "verdict": "admitted"}).encode(), is_state=False
    )
    agreement = {"model_name": "m", "engine": "0", "told": "admitted", "did": "admitted"}
    assert server.front.metrics.registry.get_sample_value("slos_serve:verdict_agreement_total", agreement) == 1.0


async def test_a_weaker_promise_is_told_with_its_targets(tmp_path: Path) -> None:
    server = Server(desk(tmp_path, loaded(5, total_blocks=80)))
    asked = await waiting(server, "patient", max_tokens=3000)
    promised(server.front, (1, 1))
    await asyncio.sleep(0.01)
    server.client.goes_on.set()
    _, headers, _ = await asked
    assert (headers["x-slo-verdict"], headers["x-slo-rank"]) == ("second-best", "1")
    assert (headers["x-slo-target-ttft-ms"], headers["x-slo-target-tpot-ms"]) == ("9000", "150")


async def test_an_answer_that_begins_waits_for_nothing(tmp_path: Path) -> None:
    server = Server(desk(tmp_path, crowded()))
    asked = await waiting(server)
    server.client.goes_on.set()
    _, headers, body = await asked
    assert (headers["x-slo-verdict"], headers["x-slo-reason"]) == ("best-effort", "ttft_too_late")
    assert body.startswith(b'data: {"t":0}')
    assert answered(server.front, "best-effort", "ttft_too_late") == 1.0
    promised(server.front, (1, 0))  # too late: nobody listens, and nothing fails
    await asyncio.sleep(0.01)


async def test_no_head_waits_longer_than_a_promise_would_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_promises, "MOST_HELD_S", 0.02)
    server = Server(desk(tmp_path, crowded()))
    asked = await waiting(server)
    while answered(server.front, "best-effort", "ttft_too_late") is None:
        await asyncio.sleep(0.01)
    promised(server.front, (1, 0))
    await asyncio.sleep(0.01)
    server.client.goes_on.set()
    assert (await asked)[1]["x-slo-verdict"] == "best-effort"


async def test_a_client_that_leaves_takes_its_head_along(tmp_path: Path) -> None:
    server = Server(desk(tmp_path, crowded()))
    asked = await waiting(server)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    promised(server.front, (1, 0))
    await asyncio.sleep(0.01)
    assert len(asyncio.all_tasks()) == 1, "no task is left behind"


async def test_all_prompts_of_a_request_must_be_promised(tmp_path: Path) -> None:
    front = desk(tmp_path, crowded())
    judged = front.begin(front.version.classes.classes["chat"])
    promises = OpenPromises()
    for ticket in (1, 2, 3):
        promises.add(judged, ticket, f"r{ticket}")
    said: list[str] = []
    promises.made([(1, 0), (9, 0), (2, 0)], lambda key, verdict: said.append(f"{key} {verdict}"))
    await asyncio.sleep(0.01)
    assert said == ["r1 admitted", "r2 admitted"] and not judged.decided.is_set()
    promises.made([(3, 0)], lambda key, verdict: said.append(f"{key} {verdict}"))
    await asyncio.sleep(0.01)
    assert judged.decided.is_set() and judged.answer is not None and judged.answer.verdict == "admitted"


async def test_of_several_answers_to_a_prompt_the_engine_tells_none_so_no_head_waits(tmp_path: Path) -> None:
    server = Server(desk(tmp_path, crowded()))
    server.client.goes_on.clear()
    asked = asyncio.ensure_future(server.ask("chat", prompt_tokens=PROMPT_TOKENS, n=2))
    for _ in range(3):
        await asyncio.sleep(0.0)
    assert answered(server.front, "best-effort", "ttft_too_late") == 1.0, "told before the answer begins"
    promised(server.front, (1, 0))
    await asyncio.sleep(0.01)
    server.client.goes_on.set()
    assert (await asked)[1]["x-slo-verdict"] == "best-effort", "one of several is not taken for all"


async def test_a_fault_while_a_verdict_is_counted_harms_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(desk(tmp_path, crowded()))
    monkeypatch.setattr(server.front.metrics, "answered", lambda *_: 1 / 0)
    asked = await waiting(server)
    server.client.goes_on.set()
    status, headers, body = await asked
    assert status == 200 and headers["x-slo-verdict"] == "best-effort" and body.endswith(b"data: [DONE]\n\n")


async def test_a_head_that_cannot_be_sent_leaves_no_room_taken(tmp_path: Path) -> None:
    front = desk(tmp_path, crowded())

    async def broken(_: Message) -> None:
        raise ConnectionError("the client is gone")

    async def serve(send: Send) -> None:
        params = SimpleNamespace(extra_args={"slo_class": "chat"}, max_tokens=100, n=1)
        server.client.generate({"type": "token", "prompt_token_ids": [1] * PROMPT_TOKENS}, params, "cmpl-1-0")
        assert front._mirror._mirrors.in_flight(ENGINE) == 1
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})

    server = Server(front)
    with pytest.raises(ConnectionError):
        await judged_exchange(front, front.begin(front.version.classes.classes["chat"]), [], serve, broken)
    assert front._mirror._mirrors.in_flight(ENGINE) == 0
