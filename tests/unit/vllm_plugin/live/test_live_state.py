"""The document behind the live page: counts as on /metrics, steps, streams with slack, verdicts, history."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slos_serve.core.request import RequestTable, Status
from slos_serve.core.slo import SLO, ClassSet
from slos_serve.core.verdict import SENTENCES, Verdict, Why
from slos_serve.vllm_plugin.live.feed import MOST_STEPS
from slos_serve.vllm_plugin.live.state import LiveState, Watch
from slos_serve.vllm_plugin.live.streams import streams_of
from tests.unit.vllm_plugin.live.builders import CLASSES, Engine

CHAT = CLASSES.classes["chat"]


class Clock:
    def __init__(self) -> None:
        self.now_s = 50_000.0

    def __call__(self) -> float:
        return self.now_s


def test_counts_are_those_of_the_metrics(tmp_path: Path) -> None:
    engine, state = Engine(tmp_path), LiveState("m", CLASSES)
    for kept in (True, True, False):
        engine.ends(CHAT, Verdict.ADMITTED, kept=kept)
    engine.ends(CHAT, Verdict.BEST_EFFORT)
    engine.ends(CHAT, Verdict.ADMITTED, finished="abort")
    engine.ends(None, Verdict.NO_SLO)
    engine.after(1.0)
    state.heard(engine.wire.newest())
    chat, batch, none = state.document()["classes"]
    assert (chat["name"], batch["name"], none["name"]) == ("chat", "batch", "none")
    assert chat["requests"] == {"admitted": 3, "best-effort": 1, "aborted": 1}
    assert chat["attained"] == {"admitted": 2, "best-effort": 1}
    assert (none["requests"], none["attained"]) == ({"no-slo": 1}, {})
    for name, row in (("chat", chat), ("none", none)):
        for verdict, number in row["requests"].items():
            assert engine.count("requests_total", slo_class=name, verdict=verdict) == number
        for verdict, number in row["attained"].items():
            assert engine.count("attained_total", slo_class=name, verdict=verdict) == number
    assert chat["promise"] == "first token within 1000 ms, then 100 ms per token"
    assert batch["promise"] == "no promise"


def test_weaker_promises_are_counted_apart_and_are_promises(tmp_path: Path) -> None:
    classes = ClassSet({"chat": replace(CHAT, otherwise=(SLO(ttft_ms=9000.0), SLO(e2e_ms=60_000.0)))})
    engine, clock = Engine(tmp_path), Clock()
    state = LiveState("m", classes, clock)
    engine.after(1.0)
    state.heard(engine.wire.newest())
    for kept in (True, True, False):
        engine.ends(CHAT, Verdict.SECOND_BEST, kept=kept)
    engine.after(1.0)
    clock.now_s += 30.0
    state.heard(engine.wire.newest())
    chat = state.document()["classes"][0]
    assert (chat["requests"], chat["attained"]) == ({"second-best": 3}, {"second-best": 2})
    assert chat["promise"] == (
        "first token within 1000 ms, then 100 ms per token; "
        "else first token within 9000 ms; else answer within 60000 ms"
    )
    assert state.document()["history"]["classes"]["chat"] == {"promised": [3], "kept": [2]}


def test_steps_and_streams_go_out_only_while_somebody_looks(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.steps({"a": 1}, {}, 0.05)
    assert engine.after(1.0) == 1
    assert "steps" not in engine.wire.newest() and "streams" not in engine.wire.newest()
    assert engine.after(0.6) == 0, "unwatched, one a second is enough"
    engine.watched.touch()
    assert engine.after(0.1) == 1
    assert len(engine.wire.newest()["steps"]) == 1 and engine.wire.newest()["streams"] == []


def test_what_a_step_was_made_of(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.watched.touch()
    engine.steps({"a": 300, "b": 1, "c": 4, "d": 12}, {"c": [7, 8, 9]}, 0.05)
    engine.steps({"b": 1}, {}, None)
    engine.after(1.0)
    first, second = engine.wire.newest()["steps"]
    assert (first["prefill_tokens"], first["prefills"], first["decodes"]) == (312, 2, 2)
    assert (first["drafts"], first["held"]) == (3, 2)
    assert (first["predicted_ms"], first["measured_ms"], first["stock"]) == (40.0, 50.0, None)
    assert second["measured_ms"] is None
    for _ in range(MOST_STEPS + 5):
        engine.steps({"b": 1}, {}, 0.01)
    engine.after(1.0)
    assert len(engine.wire.newest()["steps"]) == MOST_STEPS


def test_slack_of_prompts_and_decodes(tmp_path: Path) -> None:
    table, now_s = RequestTable(), 100.0
    late = table.add(arrival_s=98.0, prompt_tokens=50, max_tokens=9, ttft_due_s=99.5, tpot_s=0.1, class_index=0)
    decoding = table.add(arrival_s=90.0, prompt_tokens=60, max_tokens=90, ttft_due_s=91.0, tpot_s=0.1, class_index=0)
    free = table.add(arrival_s=99.0, prompt_tokens=70, max_tokens=9, class_index=3)
    row = table.rows[decoding]
    row["stage_start_s"], row["stage_tokens"], row["output_tokens"] = 91.0, 95, 95
    row["running"], row["status"] = 1, Status.ADMITTED
    slots = np.array([free, decoding, late])
    one, two, three = streams_of(table.rows, slots, ["chat", "batch", "custom", "none"], now_s)
    assert (one["slo_class"], one["verdict"], one["phase"], one["slack_ms"]) == ("chat", "undecided", "waiting", -500.0)
    assert (two["verdict"], two["phase"], two["slack_ms"]) == ("admitted", "decode", pytest.approx(500.0))
    assert (three["slo_class"], three["verdict"], three["slack_ms"]) == ("none", "no-slo", None)
    assert (one["age_s"], two["output_tokens"], three["prompt_tokens"]) == (2.0, 95, 70)
    assert len(streams_of(table.rows, slots, ["chat"], now_s, most=1)) == 1
    table.rows[late]["status"] = Status.BEST_EFFORT
    given_up = streams_of(table.rows, slots, ["chat", "batch", "custom", "none"], now_s)
    assert [each["verdict"] for each in given_up] == ["admitted", "best-effort", "no-slo"]
    assert streams_of(table.rows, np.empty(0, np.int64), ["chat"], now_s) == []


def test_the_history_tells_what_was_kept_in_each_part(tmp_path: Path) -> None:
    engine, clock = Engine(tmp_path), Clock()
    state = LiveState("m", CLASSES, clock)

    def tell() -> None:
        engine.after(1.0)
        state.heard(engine.wire.newest())

    tell()
    for kept in (True, False, True):
        clock.now_s += 10.0
        engine.ends(CHAT, Verdict.ADMITTED, kept=kept)
        engine.queues((1, 2, 0), (0, 0, 4))
        tell()
    history = state.document()["history"]
    assert history["classes"]["chat"] == {"promised": [1, 1, 1], "kept": [1, 0, 1]}
    assert (history["running"], history["waiting"]) == ([3, 3, 3], [4, 4, 4])
    clock.now_s += 600.0
    assert state.document()["history"]["end_s"] == [], "older than ten minutes"


def test_verdicts_are_told_in_words_and_without_what_a_client_wrote(tmp_path: Path) -> None:
    engine, state = Engine(tmp_path), LiveState("m", CLASSES)
    state.told("chat", Verdict.ADMITTED, Why.FITS, 0.25, 1.0)
    state.told("a name of its own", Verdict.REJECTED, Why.KV_FULL)
    engine.ends(CHAT, Verdict.ADMITTED)
    engine.after(1.0)
    state.heard(engine.wire.newest())
    document = state.document()
    newest, oldest = document["verdicts"]
    assert (newest["slo_class"], newest["verdict"], newest["text"]) == ("custom", "rejected", SENTENCES[Why.KV_FULL])
    assert (oldest["predicted_ttft_ms"], oldest["target_ttft_ms"]) == (250.0, 1000.0)
    assert newest["predicted_ttft_ms"] is None and newest["target_ttft_ms"] is None
    assert next(row for row in document["classes"] if row["name"] == "custom")["told"] == {"rejected": 1}
    text = json.dumps(document, allow_nan=False)
    assert "a name of its own" not in text and "secret-name" not in text


def test_before_the_engine_has_said_anything() -> None:
    document = LiveState("m", CLASSES).document()
    assert document["heard_s_ago"] is None and document["armed"] is None
    assert [row["requests"] for row in document["classes"]] == [{}, {}]
    json.dumps(document, allow_nan=False)


def test_the_engine_hears_that_somebody_looks_until_nobody_does(tmp_path: Path) -> None:
    clock = Clock()
    watch = Watch(tmp_path / "7.watched", clock)
    watch.looked()
    watch.rest()
    assert (tmp_path / "7.watched").exists()
    clock.now_s += 11.0
    watch.rest()
    assert not (tmp_path / "7.watched").exists()
    watch.looked()
    assert (tmp_path / "7.watched").exists()
