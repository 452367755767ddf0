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
