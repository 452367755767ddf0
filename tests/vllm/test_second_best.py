"""Weaker promises on vLLM's real scheduler: asked for once the one before is given up, scored by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from tests.vllm.dry_load import Start, events, prompt

FIRST = "{ttft_ms: 600, tpot_ms: 100%s}"
WEAKER = ", otherwise: [{ttft_ms: 1500, tpot_ms: 150}, {ttft_ms: 8000, tpot_ms: 200}]"


def burst(start: Start, folder: Path, class_text: str) -> list[dict[str, Any]]:
    """Events of 30 prompts that come together, three times what can be promised within 600 ms."""
    (folder / "classes.yaml").write_text(f"classes:\n  chat: {class_text}\n", encoding="utf-8")
    (folder / "events.jsonl").unlink(missing_ok=True)
    engine, rng = start(), np.random.default_rng(3)
    for number in range(30):
        engine.add(f"r{number}", prompt(rng, 400), 20, {"slo_class": "chat"})
    engine.run()
    assert engine.scheduler._slo.guard.counts == {}
    return events(folder, "request")


def test_who_cannot_have_the_first_promise_gets_a_weaker_one(start: Start, tmp_path: Path) -> None:
    alone = burst(start, tmp_path, FIRST % "")
    found = burst(start, tmp_path, FIRST % WEAKER)
    by_verdict: dict[str, list[dict[str, Any]]] = {}
    for event in found:
        by_verdict.setdefault(event["verdict"], []).append(event)
    first, second = by_verdict["admitted"], by_verdict["second-best"]
    assert len(first) + len(second) == len(found), "everybody gets some promise"
    assert len(first) >= len([event for event in alone if event["verdict"] == "admitted"]) - 1
    assert {event["rank"] for event in first} == {0}
    assert {event["rank"] for event in second} == {1, 2}, "in order"
    assert all(event["ttft_ok"] and event["tpot_ok"] for event in found)
    limits_s = {0: 0.6, 1: 1.5, 2: 8.0}
    assert all(event["ttft_s"] <= limits_s[event["rank"]] for event in found)
    assert any(event["ttft_s"] > 0.6 for event in second), "kept by the promise that was given"


def test_when_the_list_is_used_up_the_first_promise_is_what_counts(start: Start, tmp_path: Path) -> None:
    lost = "{ttft_ms: 1, otherwise: [{ttft_ms: 2}, {ttft_ms: 3}]}"
    for event in burst(start, tmp_path, lost):
        assert (event["verdict"], event["rank"], event["ttft_ok"]) == ("best-effort", None, False)
        assert event["ttft_ratio"] > 10.0, "over 1 ms, not over 3"


def test_numbers_of_its_own_have_nothing_weaker(start: Start, tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text(f"classes:\n  chat: {FIRST % WEAKER}\n", encoding="utf-8")
    engine = start()
    engine.add("own", [5] * 400, 4, {"slo_class": "chat", "slo_ttft_ms": 1})
    engine.run()
    assert [event["verdict"] for event in events(tmp_path, "request")] == ["best-effort"]
