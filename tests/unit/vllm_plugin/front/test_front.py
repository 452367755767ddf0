"""The front end of one server: verdicts before the first byte, refusals, reservations, and what was measured."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from slos_serve.core.verdict import Verdict
from slos_serve.routing.headroom import headroom
from slos_serve.vllm_plugin.front import desk as desk_module
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.judged import prompt_tokens
from tests.builders import OPT_13B_A100
from tests.unit.routing.fleet import NOW_S, loaded, published, request
from tests.unit.vllm_plugin.front.builders import Server, desk


class RequestKind(Enum):
    """As vLLM says whether an answer is streamed."""

    DELTA = 1
    FINAL_ONLY = 2


def count(front: FrontDesk, name: str, **labels: str) -> float | None:
    found = {"model_name": "m", "engine": "0"} | labels
    return front.metrics.registry.get_sample_value(f"slos_serve:{name}", found)


async def test_a_request_that_fits_is_told_so_with_targets_and_predictions(tmp_path: Path) -> None:
    server = Server(desk(tmp_path, loaded(5)))
    status, headers, _ = await server.ask("chat")
    assert status == 200
    assert headers["x-slo-verdict"] == "admitted" and headers["x-slo-reason"] == "fits"
    assert headers["x-slo-target-ttft-ms"] == "1000"
    assert 10 < int(headers["x-slo-predicted-ttft-ms"]) < 1000
    assert 10 < int(headers["x-slo-predicted-tpot-ms"]) <= 100


async def test_even_the_shortest_prompt_takes_a_step(tmp_path: Path) -> None:
    _, headers, _ = await Server(desk(tmp_path, loaded(0))).ask("chat", prompt_tokens=1)
    assert int(headers["x-slo-predicted-ttft-ms"]) >= int(1000.0 * OPT_13B_A100.zero_load_s(1))


@pytest.mark.parametrize("slo_class", [None, "batch"])
async def test_without_a_promise_there_is_none(tmp_path: Path, slo_class: str | None) -> None:
    _, headers, _ = await Server(desk(tmp_path, loaded(0))).ask(slo_class)
    assert (headers["x-slo-verdict"], headers["x-slo-reason"]) == ("no-slo", "no_slo")
    assert "x-slo-predicted-ttft-ms" not in headers


async def test_before_the_engine_has_published_nothing_is_said_or_refused(tmp_path: Path) -> None:
    status, headers, _ = await Server(desk(tmp_path)).ask("strict", prompt_tokens=4000)
    assert status == 200 and "x-slo-verdict" not in headers


async def test_what_binds_is_named(tmp_path: Path) -> None:
    _, late, _ = await Server(desk(tmp_path, loaded(0))).ask("chat", prompt_tokens=4000, max_tokens=50_000)
    full = loaded(0)
    for _ in range(8):
        full.wait(1500, due_in_s=1.0)
    _, crowded, _ = await Server(desk(tmp_path, full)).ask("chat", prompt_tokens=3900)
    _, memory, _ = await Server(desk(tmp_path, loaded(5, total_blocks=80))).ask("chat", max_tokens=3000)
    assert late["x-slo-verdict"] == "admitted"
    assert (crowded["x-slo-verdict"], crowded["x-slo-reason"]) == ("best-effort", "ttft_too_late")
    assert (memory["x-slo-verdict"], memory["x-slo-reason"]) == ("best-effort", "kv_full")


async def test_a_hundred_at_once_get_what_there_is_room_for(tmp_path: Path) -> None:
    engine = loaded(0)
    for _ in range(2):
        engine.prefilling(1500, 100, due_in_s=1.0)
    room = headroom(published(engine), request(400, tpot_s=0.1), 100.0)
    assert 3 <= room <= 20
    server = Server(desk(tmp_path, engine))
    answers = await server.ask_at_once(100, "strict", prompt_tokens=400)
    admitted = [headers for status, headers, _ in answers if status == 200]
    refused = [headers for status, headers, _ in answers if status == 429]
    assert len(admitted) == len(server.client.taken) and abs(len(admitted) - room) <= 1
    assert len(refused) == 100 - len(admitted)
    assert all(headers["x-slo-verdict"] == "admitted" for headers in admitted)
    waits = [int(headers["retry-after"]) for headers in refused]
    assert min(waits) >= 1 and max(waits) <= 60
    assert waits == sorted(waits) and waits[-1] > waits[0], "each refusal is told a later time"


async def test_who_cannot_have_the_first_promise_is_told_the_next_one(tmp_path: Path) -> None:
    engine = loaded(0)
    for _ in range(2):
        engine.prefilling(1500, 100, due_in_s=1.0)
    server = Server(desk(tmp_path, engine))
    answers = [answer[1:] for answer in await server.ask_at_once(40, "patient", prompt_tokens=400)]
    words = [headers["x-slo-verdict"] for headers, _ in answers]
    assert {"admitted", "second-best"} <= set(words) and words[0] == "admitted"
    for headers, body in answers:
        if headers["x-slo-verdict"] == "second-best":
            assert headers["x-slo-rank"] == "1" and b'"rank":1' in body and b'"target_tpot_ms":150.0' in body
            assert (headers["x-slo-target-ttft-ms"], headers["x-slo-target-tpot-ms"]) == ("9000", "150")
            assert int(headers["x-slo-predicted-ttft-ms"]) <= 9000
        elif headers["x-slo-verdict"] == "admitted":
            assert "x-slo-rank" not in headers and headers["x-slo-target-ttft-ms"] == "1000"
    alone = Server(desk(tmp_path, engine))
    first = [headers["x-slo-verdict"] for _, headers, _ in await alone.ask_at_once(40, "chat", prompt_tokens=400)]
    assert words.count("admitted") == first.count("admitted"), "the weaker promises cost nobody the first"


async def test_the_engine_is_told_what_the_client_was(tmp_path: Path) -> None:
    engine = loaded(0)
    for _ in range(2):
        engine.prefilling(1500, 100, due_in_s=1.0)
    server = Server(desk(tmp_path, engine))
    await server.ask_at_once(40, "patient", prompt_tokens=2000)
    told = list(server.client.extra_args.values())
    words = [one.get("slo_told") for one in told]
    assert set(words) == {1, None}, "its rank; nothing of those that it decides on"
    assert sorted(int(str(one["slo_ticket"])) for one in told) == list(range(1, 41))
    assert all(one["slo_class"] == "patient" for one in told)


@pytest.mark.parametrize(
    ("slo_class", "given", "told"),
    [
        ("chat", {}, None),
        ("chat", {"output_kind": RequestKind.FINAL_ONLY}, None),
        ("slow", {}, 0),
        ("slow", {"output_kind": RequestKind.DELTA}, 0),
        ("slow", {"output_kind": RequestKind.FINAL_ONLY}, None),
        ("strict", {}, 0),
        ("strict", {"output_kind": RequestKind.FINAL_ONLY}, 0),
    ],
)
async def test_the_engine_is_bound_by_what_is_said_before_it_decides(
    tmp_path: Path, slo_class: str, given: dict[str, Any], told: int | None
) -> None:
    server = Server(desk(tmp_path, loaded(0)))
    _, headers, _ = await server.ask(slo_class, **given)
    assert headers["x-slo-verdict"] == "admitted" and headers["x-slo-reason"] == "fits"
    assert server.client.extra_args["cmpl-1-0"].get("slo_told") == told


async def test_where_the_engine_may_begin_prompts_unplanned_everybody_is_told_at_once(tmp_path: Path) -> None:
    server = Server(desk(tmp_path, loaded(0)), promises=False)
    server.front.tells_at_once = True
    _, headers, _ = await server.ask("chat")
    assert headers["x-slo-verdict"] == "admitted" and server.client.extra_args["cmpl-1-0"]["slo_told"] == 0


async def test_who_fitted_and_was_passed_over_is_told_so(tmp_path: Path) -> None:
    server = Server(desk(tmp_path, loaded(0)), promises=False)
    _, headers, body = await server.ask("chat")
    assert (headers["x-slo-verdict"], headers["x-slo-reason"]) == ("best-effort", "passed_over")
    assert "x-slo-predicted-ttft-ms" not in headers and b'"verdict":"best-effort"' in body
    assert count(server.front, "answers_total", slo_class="chat", verdict="best-effort", reason="passed_over") == 1.0
    outcome = {"request_id": "cmpl-1-0", "verdict": Verdict.BEST_EFFORT, "finished": "stop"}
    server.front.heard(json.dumps(outcome).encode(), is_state=False)
    assert count(server.front, "verdict_agreement_total", told="best-effort", did="best-effort") == 1.0


async def test_a_request_keeps_its_room_until_its_engine_names_it(tmp_path: Path) -> None:
    server = Server(desk(tmp_path, loaded(0, total_blocks=100)))
    server.client.goes_on.clear()
    ask = functools.partial(server.ask, "strict", prompt_tokens=1000, max_tokens=100)
    waiting = [asyncio.ensure_future(ask())]
    await asyncio.sleep(0.0)

    def hear(sequence: int, later_s: float, tickets: list[int]) -> None:
        found = published(loaded(0, total_blocks=100), sequence=sequence, time_s=NOW_S + later_s).as_dict()
        server.front.heard(json.dumps({**found, "tickets": tickets}).encode(), is_state=True)

    hear(1, 0.1, [])
    assert (await ask())[0] == 429, "however old it is: the hand-over may be slow"
    hear(2, 0.11, [1])
    hear(3, 0.12, [])
    waiting.append(asyncio.ensure_future(ask()))
    await asyncio.sleep(0.0)
    server.client.goes_on.set()
    assert [status for status, _, _ in await asyncio.gather(*waiting)] == [200, 200]
    assert (await ask())[0] == 200, "an answer that has ended needs no room"


async def test_a_fault_while_room_is_given_back_harms_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_ticket: int) -> None:
        raise KeyError("no such ticket")

    server = Server(desk(tmp_path, loaded(0)))
    monkeypatch.setattr(server.front._mirror, "withdraw", fails)
    status, headers, body = await server.ask("strict")
    assert (status, headers["x-slo-verdict"]) == (200, "admitted") and body.endswith(b"data: [DONE]\n\n")


async def test_a_refusal_says_why_in_openais_shape_and_reaches_no_engine(tmp_path: Path) -> None:
    engine = loaded(0)
    for _ in range(8):
        engine.wait(1500, due_in_s=1.0)
    server = Server(desk(tmp_path, engine))
    status, headers, body = await server.ask("spare", prompt_tokens=3900)
    assert status == 503 and server.client.taken == []
    assert headers["x-slo-verdict"] == "rejected" and int(headers["retry-after"]) >= 1
    assert headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
    error = json.loads(body)["error"]
    assert error["code"] == 503 and error["param"] == "slo_class"
    assert "first token is due" in error["message"] and headers["retry-after"] in error["message"]
    assert count(server.front, "answers_total", slo_class="spare", verdict="rejected", reason="ttft_too_late") == 1.0


async def test_the_usage_chunk_says_what_was_promised_and_measured(tmp_path: Path) -> None:
    _, _, body = await Server(desk(tmp_path, loaded(0))).ask("chat")
    chunks = [json.loads(part.removeprefix(b"data: ")) for part in body.split(b"\n\n") if part.startswith(b"data: {")]
    said = chunks[-1]["usage"]["slo"]
    assert said["class"] == "chat" and said["verdict"] == "admitted"
    assert said["target_ttft_ms"] == 1000.0 and said["target_tpot_ms"] == 100.0
    assert said["ttft_ms"] == 0.0 and said["predicted_ttft_ms"] > 0.0
    assert all("slo" not in json.dumps(chunk) for chunk in chunks[:-1])
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("engines_id", ["cmpl-1-0", "cmpl-1-0-0a1b2c3d", "0_cmpl-1-0-0a1b2c3d"])
async def test_the_engines_outcome_is_compared_with_what_was_told(tmp_path: Path, engines_id: str) -> None:
    server = Server(desk(tmp_path, loaded(0)))
    await server.ask("chat")
    outcome = {"request_id": engines_id, "verdict": Verdict.BEST_EFFORT, "finished": "stop"}
    server.front.heard(json.dumps(outcome).encode(), is_state=False)
    server.front.heard(json.dumps(outcome).encode(), is_state=False)
    assert count(server.front, "verdict_agreement_total", told="admitted", did="best-effort") == 1.0
    assert count(server.front, "verdict_agreement_total", told="admitted", did="admitted") == 0.0


async def test_a_fault_of_ours_costs_the_verdict_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(desk(tmp_path, loaded(0)))
    monkeypatch.setattr(server.front._asking, "of", lambda *_: 1 / 0)
    for _ in range(2):
        status, headers, body = await server.ask("chat")
        assert status == 200 and "x-slo-verdict" not in headers and b"[DONE]" in body
    assert caplog.text.count("failed to judge") == 1
    server.front.heard(b"no JSON", is_state=True)


def test_the_log_says_from_when_on_answers_have_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On the first start that is a minute after the server answers: its kernels are compiled beside it."""
    front = desk(tmp_path, loaded(0))
    monkeypatch.setattr(desk_module, "load_kernels", lambda: caplog.clear())
    front.close()  # so that its loop ends at once
    with caplog.at_level(logging.INFO):
        front._run()
    assert "answers have verdicts from now on" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ({"prompt_token_ids": [1, 2, 3]}, 3),
        ({"type": "multimodal", "prompt_token_ids": [1, 2]}, 2),
        ({"decoder_prompt": {"prompt_token_ids": [1]}}, 1),
        ("text", None),
        ({"prompt": "text"}, None),
    ],
)
def test_prompt_tokens(prompt: object, tokens: int | None) -> None:
    assert prompt_tokens(prompt) == tokens
