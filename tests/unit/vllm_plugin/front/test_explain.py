"""Explain: the desk's own answer, asked beforehand, counted nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slos_serve.cli.explain import told
from slos_serve.core.errors import InvalidFieldError
from slos_serve.vllm_plugin.asgi import Message
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.explain import ExplainRoute, Load, explain, loaded_desk
from slos_serve.vllm_plugin.slo_args import SloArgs
from tests.builders import EngineBuilder
from tests.unit.routing.fleet import loaded
from tests.unit.vllm_plugin.front.builders import Server, config_in, desk


def crowded() -> EngineBuilder:
    engine = loaded(0)
    for _ in range(8):
        engine.wait(1500, due_in_s=1.0)
    return engine


@pytest.mark.parametrize("slo_class", ["chat", "strict", "spare", "batch", "patient"])
@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens"),
    [(100, 100), (3900, 100), (100, 3000)],
)
async def test_what_is_explained_is_what_the_next_request_is_told(
    tmp_path: Path, slo_class: str, prompt_tokens: int, max_tokens: int
) -> None:
    for engine in (loaded(5), crowded(), loaded(5, total_blocks=80)):
        front = desk(tmp_path, engine)
        found = explain(front, SloArgs(slo_class=slo_class), prompt_tokens, max_tokens)
        status, headers, _ = await Server(front).ask(slo_class, prompt_tokens=prompt_tokens, max_tokens=max_tokens)
        assert (found.verdict, found.reason) == (headers["x-slo-verdict"], headers["x-slo-reason"])
        assert (found.status or 200) == status
        assert found.rank == int(headers.get("x-slo-rank", 0))
        if found.verdict in ("admitted", "second-best"):
            assert found.target_ttft_ms == float(headers["x-slo-target-ttft-ms"])
            assert found.predicted_ttft_ms == pytest.approx(int(headers["x-slo-predicted-ttft-ms"]), abs=1.0)


async def test_asking_counts_nothing(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    first = explain(front, SloArgs(slo_class="strict"), 1500)
    for _ in range(50):
        assert explain(front, SloArgs(slo_class="strict"), 1500) == first
    server = Server(front)
    answers = await server.ask_at_once(first.room + 3, "strict", prompt_tokens=1500)
    told = [headers["x-slo-verdict"] for _, headers, _ in answers]
    assert told.count("admitted") >= first.room
    assert "rejected" in told


def test_the_room_is_what_fits_and_what_stops_the_next_is_named(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    found = explain(front, SloArgs(slo_class="chat"), 3000, 100)
    assert 1 <= found.room < 32 and found.next_obstacle == "ttft_too_late"
    memory = explain(desk(tmp_path, loaded(0, total_blocks=600)), SloArgs(slo_class="chat", expected_tokens=900), 100)
    assert 1 <= memory.room < 32 and memory.next_obstacle == "kv_full"
    assert memory.kv_blocks is not None and memory.kv_blocks_left is not None
    assert memory.room == memory.kv_blocks_left // memory.kv_blocks


def test_a_request_that_is_longer_than_the_context_is_refused_as_the_server_does(tmp_path: Path) -> None:
    front = loaded_desk(config_in(tmp_path), Load(), 4096)
    assert explain(front, SloArgs(slo_class="chat"), 3996, 100).prompt_tokens == 3996
    with pytest.raises(InvalidFieldError, match=r"got '3997 and 100 answer tokens'.*at most 4096 together"):
        explain(front, SloArgs(slo_class="chat"), 3997, 100)
    with pytest.raises(InvalidFieldError, match="at most 4096 together"):
        explain(front, SloArgs(slo_class="batch"), 4096)


def test_a_described_load_binds_as_the_same_engine_does(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    rooms = []
    for running in (0, 40, 80):
        front = loaded_desk(config, Load(running={"chat": running}, prompt_tokens=200, answer_tokens=100), 4096)
        found = explain(front, SloArgs(slo_class="chat"), 800, 100)
        rooms.append((found.room, found.prefill_rate))
    assert rooms == sorted(rooms, reverse=True) and rooms[0] != rooms[-1]
    late = loaded_desk(config, Load(waiting={"chat": 20}, prompt_tokens=1500), 4096)
    assert explain(late, SloArgs(slo_class="chat"), 1500, 100).reason in ("ttft_too_late", "fits_instead")


def test_a_load_that_the_engine_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidFieldError, match="KV blocks"):
        loaded_desk(config_in(tmp_path), Load(running={"chat": 250}, prompt_tokens=2000), 4096)
    with pytest.raises(InvalidFieldError, match="max-num-seqs"):
        loaded_desk(config_in(tmp_path), Load(running={"chat": 300}, prompt_tokens=10), 4096)
    with pytest.raises(InvalidFieldError, match="gold"):
        loaded_desk(config_in(tmp_path), Load(running={"gold": 1}), 4096)


async def answered(
    front: FrontDesk, query: str, keys: tuple[str, ...] = (), key: str = ""
) -> tuple[int, dict[str, object]]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": "http", "method": "GET", "headers": headers, "query_string": query.encode()}
    await ExplainRoute(front, keys)(scope, send)
    return int(sent[0]["status"]), json.loads(sent[1]["body"])


async def test_a_server_with_keys_wants_one(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(5))
    for key, status in (("", 401), ("wrong", 401), ("right", 200)):
        assert (await answered(front, "prompt_tokens=1", ("right", "other"), key))[0] == status


async def test_the_route_answers_and_names_what_is_wrong(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(5))
    status, found = await answered(front, "class=chat&prompt_tokens=100&max_tokens=50")
    assert status == 200 and found["verdict"] == "admitted" and found["target_ttft_ms"] == 1000.0
    for query, field in (
        ("class=gold&prompt_tokens=1", "slo_class"),
        ("class=chat", "prompt_tokens"),
        ("prompt_tokens=0", "prompt_tokens"),
        ("prompt_tokens=1&colour=red", "query"),
        ("prompt_tokens=1&max_tokens=x", "max_tokens"),
        ("&".join(["prompt_tokens=1"] * 30), "query"),
        ("prompt_tokens=%FF&class=%FF", "prompt_tokens"),
    ):
        status, found = await answered(front, query)
        error = found["error"]
        assert isinstance(error, dict)
        assert (status, error["param"]) == (400, field), query
    status, _ = await answered(desk(tmp_path), "prompt_tokens=100")
    assert status == 503


def test_the_weaker_promise_that_is_given_is_explained(tmp_path: Path) -> None:
    front = desk(tmp_path, crowded())
    found = explain(front, SloArgs(slo_class="patient"), 3000, 100)
    assert (found.verdict, found.rank) == ("second-best", 1)
    assert found.promises == [{"ttft_ms": 1000.0, "tpot_ms": 100.0}, {"ttft_ms": 9000.0, "tpot_ms": 150.0}]
    assert found.target_ttft_ms == 9000.0 and found.predicted_ttft_ms is not None
    assert 1000.0 < found.predicted_ttft_ms < 9000.0
    assert found.room > 1, "of the weaker promise"
    lines = list(told(found))
    assert lines[1:3] == [
        "promises      1. first token 1000 ms, 100 ms per token: does not fit",
        "              2. first token 9000 ms, 150 ms per token: given",
    ]
    first = explain(desk(tmp_path, loaded(0)), SloArgs(slo_class="patient"), 100, 100)
    assert [line.rpartition(": ")[2] for line in told(first)][1:3] == ["given", "not asked for"]
    assert explain(front, SloArgs(slo_class="chat"), 100).promises == []
