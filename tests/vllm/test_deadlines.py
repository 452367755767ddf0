"""Complete answers with a deadline, on vLLM's real scheduler in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from slos_serve.testing.dry_engine import DryEngine
from slos_serve.testing.request import PLAIN
from slos_serve.vllm_plugin.scheduler import SLOScheduler
from tests.vllm.dry_load import Start, assert_answers, events, lengths, prompt

CLASSES = "classes:\n  chat: {ttft_ms: 3000, tpot_ms: 150}\n  answer: {e2e_ms: 6000}\n"


@pytest.fixture(autouse=True)
def with_deadlines(start: Start, tmp_path: Path) -> None:
    """A class of which only the complete answer is promised, beside a patient chat."""
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")


def add(engine: DryEngine, name: str, tokens: int, answer: int, slo: dict[str, Any] | None) -> None:
    lengths[name] = (prompt(np.random.default_rng(len(lengths)), tokens), answer)
    engine.add(name, *lengths[name], slo, PLAIN)


def test_a_deadline_is_kept_beside_a_queue_that_is_patient(start: Start, tmp_path: Path) -> None:
    """Twelve long prompts came first; in stock order they are computed before the answer with the deadline begins."""
    took_s = {}
    for cls in (AsyncScheduler, SLOScheduler):
        engine = start(cls)
        for number in range(12):
            add(engine, f"{cls.__name__}{number}", 4000, 20, None)
        add(engine, f"{cls.__name__}due", 500, 40, {"slo_class": "answer"})
        engine.run()
        took_s[cls] = engine.token_times_s[f"{cls.__name__}due"][-1]
    assert took_s[SLOScheduler] <= 6.0 < took_s[AsyncScheduler], took_s
    assert_answers(engine)
    (ended,) = [event for event in events(tmp_path, "request") if event["slo_class"] == "answer"]
    assert (ended["verdict"], ended["e2e_ok"], ended["ttft_ok"], ended["tpot_ok"]) == ("admitted", True, True, True)


def test_a_deadline_that_cannot_be_kept_is_served_and_counted(start: Start, tmp_path: Path) -> None:
    engine = start()
    add(engine, "hopeless", 500, 400, {"slo_class": "answer", "slo_e2e_ms": 2000, "slo_expected_tokens": 400})
    engine.run()
    assert_answers(engine)
    (ended,) = events(tmp_path, "request")
    assert (ended["e2e_ok"], ended["ttft_ok"], ended["tpot_ok"]) == (False, True, True)
    metrics = engine.scheduler._slo.recorder.metrics
    assert metrics._violations["answer", ended["verdict"], "e2e"]._value.get() == 1.0


def test_many_deadlines_and_streams_are_kept(start: Start, tmp_path: Path) -> None:
    engine, rng = start(), np.random.default_rng(5)
    for number in range(40):
        slo = {"slo_class": "answer" if number % 2 else "chat"}
        add(engine, f"r{number}", int(rng.integers(100, 900)), int(rng.integers(5, 90)), slo)
        until_s = engine.now_s + float(rng.exponential(0.3))
        while engine.now_s < until_s:
            engine.step()
    engine.run()
    assert_answers(engine)
    ended = [event for event in events(tmp_path, "request") if event["verdict"] == "admitted"]
    assert len(ended) >= 36
    kept = [event["ttft_ok"] and event["tpot_ok"] and event["e2e_ok"] for event in ended]
    assert sum(kept) >= 0.95 * len(kept)
