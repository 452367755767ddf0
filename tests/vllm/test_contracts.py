"""What vLLM does with a scheduler beyond calling it step by step: names of arguments, guards, sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from slos_serve.testing.request import RequestFeatures
from tests.vllm.dry_load import Start, events, prompt
from tests.vllm.progress_check import check_rows

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
CHAT = {"slo_class": "chat"}


def test_outputs_may_be_given_by_name(start: Start) -> None:
    """With drafts in flight, whose verdict is read of the arguments."""
    engine = start(depth=1, speculative_config=NGRAM)
    update = engine.scheduler.update_from_output

    def by_name(output: Any, result: Any) -> Any:
        return update(scheduler_output=output, model_runner_output=result)

    engine.scheduler.update_from_output = by_name
    engine.add("drafts", [8, 9] * 40, 40, CHAT)
    engine.run()
    assert len(engine.answers["drafts"]) == 40
    assert engine.num_drafted > 0
    assert engine.scheduler._slo.guard.counts == {}


def test_a_full_engine_with_a_queue_is_known_to_data_parallel_balancing(start: Start) -> None:
    """vLLM computes it over its lists, of which a planned step shows a part."""
    engine = start(max_num_seqs=2)
    scheduler = engine.scheduler
    if not hasattr(scheduler, "prefill_capacity_bound"):
        pytest.skip("this vLLM has no such guard")
    rng = np.random.default_rng(1)
    for number in range(4):
        engine.add(f"r{number}", prompt(rng, 100), 30, CHAT)
    for _ in range(6):
        engine.step()
    assert len(scheduler.running) == 2
    assert scheduler.prefill_capacity_bound
    engine.run()
    engine.add("alone", prompt(rng, 100), 10, CHAT)
    engine.step()
    assert not scheduler.prefill_capacity_bound


def test_the_pause_between_two_turns_breaks_no_promise(start: Start, tmp_path: Path) -> None:
    engine = start()
    check_rows(engine.scheduler)
    rng = np.random.default_rng(1)
    engine.add("session", prompt(rng, 50), 10, CHAT, RequestFeatures(resumable=True))
    for _ in range(20):
        engine.step()
    engine.now_s += 5.0
    before = len(engine.answers["session"])
    engine.add_turn("session", prompt(rng, 60), 10, CHAT)
    for _ in range(20):
        engine.step()
    assert len(engine.answers["session"]) > before + 5
    engine.close("session")
    engine.run()
    (event,) = events(tmp_path, "request")
    assert (event["finished"], event["ttft_ok"], event["tpot_ok"]) == ("stop", True, True)
    assert event["ttft_s"] < 1.0  # of the second turn, counted from its own arrival
    assert engine.scheduler._slo.guard.counts == {}
