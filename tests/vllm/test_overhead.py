"""What the plug-in adds to a step, in calls: time on a shared machine tells little, calls are the same everywhere."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import slos_serve
from slos_serve.testing.dry_engine import DryEngine
from slos_serve.vllm_plugin.config import PLAN_LIMIT_ENV
from slos_serve.vllm_plugin.publish import EnginePublisher
from slos_serve.vllm_plugin.queues import Queues
from tests.vllm.dry_load import Start, prompt

PLUGIN = str(Path(slos_serve.__file__).parent / "vllm_plugin")
STEPS = 20


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan is late, however busy the machine is."""
    monkeypatch.setenv(PLAN_LIMIT_ENV, "1000")


def calls_in_the_plugin(engine: DryEngine) -> Counter[str]:
    """Python functions of the plug-in, and what these call, by name, in ``STEPS`` steps."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, what: Any) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(PLUGIN):
            calls[frame.f_code.co_name if event == "call" else what.__name__] += 1

    sys.setprofile(note)
    try:
        for _ in range(STEPS):
            engine.step()
    finally:
        sys.setprofile(None)
    return calls


def decoding(start: Start, count: int) -> DryEngine:
    """An engine with that many promised decodes, all of them running."""
    engine = start(num_blocks=20_000, max_num_seqs=256)
    rng = np.random.default_rng(2)
    for number in range(count):
        engine.add(f"r{number}", prompt(rng, 40), 200, {"slo_class": "chat"})
    while any(len(answer) < 5 for answer in engine.answers.values()):
        engine.step()
    return engine


def test_calls_of_a_step_do_not_grow_with_the_running_requests(start: Start) -> None:
    """But for the tokens that come, of which each request's are noted by themselves."""
    few, many = (calls_in_the_plugin(decoding(start, count)) for count in (32, 256))
    for calls in (few, many):
        for name in ("tokens_came", "get", "num_output_tokens", "append", "more_stages", "stages", "len"):
            del calls[name]
    assert sum(few.values()) / STEPS < 260, few.most_common(12)
    assert sum(many.values()) <= 1.1 * sum(few.values()), (many - few).most_common(12)


def queueing(start: Start, waiting: int) -> DryEngine:
    """A full engine that publishes before every step; nobody has a promise."""
    engine = start(num_blocks=20_000, max_num_seqs=16)
    control = engine.scheduler._slo
    control.publisher = EnginePublisher("ipc:///nonexistent/engine", control.policy, every_s=0.0)
    rng = np.random.default_rng(2)
    for number in range(16 + waiting):
        engine.add(f"r{number}", prompt(rng, 40), 200)
    for _ in range(10):
        engine.step()
    return engine


def test_without_a_promise_publishing_costs_no_more_calls_in_a_deep_queue(start: Start) -> None:
    few, many = (calls_in_the_plugin(queueing(start, waiting)) for waiting in (600, 3000))
    assert sum(many.values()) <= 1.1 * sum(few.values()), (many - few).most_common(12)


def test_what_stock_steps_do_to_the_queues_is_known_without_a_scan(start: Start) -> None:
    engine = start(num_blocks=80, max_num_seqs=16)
    control, rng = engine.scheduler._slo, np.random.default_rng(3)
    preempted = 0
    for step in range(400):
        if step % 3 == 0:
            engine.add(f"r{step}", prompt(rng, 100), int(rng.integers(1, 160)))
        if step % 20 == 7:
            engine.abort(f"r{3 * int(rng.integers(0, 1 + step // 3))}")
        engine.step()
        control.queues.look()
        anew = Queues(engine.scheduler, control.book)
        anew.look()
        assert (control.queues.startable, control.queues.blocked) == (anew.startable, anew.blocked)
        assert control.queues._slots is not None
        assert sorted(control.queues._slots.tolist()) == sorted(anew.startable)
        preempted = max(preempted, sum(request.num_preemptions for request in engine.scheduler.requests.values()))
    assert preempted > 0 and control.queues.scans < 100, "some steps preempt, and are looked at anew"
