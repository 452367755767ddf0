"""Weaker promises and complete answers in the simulator: asked for, made and scored as on an engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slos_serve.core.slo import SLO, SLOClass, single_stage
from slos_serve.sim.outcome import Outcome, summarize_run
from tests.sim_builders import GPU, run, workload

FIRST = single_stage("support", SLO(ttft_ms=1000.0, tpot_ms=100.0))
BOTH = replace(FIRST, otherwise=(SLO(ttft_ms=4000.0, tpot_ms=150.0), SLO(e2e_ms=30_000.0)))


def burst(slo_class: SLOClass, policy: str = "slos-serve") -> Outcome:
    """Thirty prompts that come at once; a third of them can have their first promise."""
    load = workload([0.01 * number for number in range(30)], [1500] * 30, [20] * 30, (slo_class,))
    return summarize_run(run(load, policy, model=GPU))


def test_who_cannot_have_the_first_promise_gets_the_next() -> None:
    without, with_weaker = burst(FIRST), burst(BOTH)
    assert 5 <= without.admitted < 15 and without.second_best == 0
    assert with_weaker.admitted == without.admitted
    assert with_weaker.attained >= without.attained - 1
    assert with_weaker.admitted + with_weaker.second_best >= 26
    assert with_weaker.second_best_attained >= 0.95 * with_weaker.second_best


def test_policies_that_make_no_promises_make_no_weaker_ones() -> None:
    for policy in ("vllm", "qoserve"):
        outcome = burst(BOTH, policy)
        assert (outcome.second_best, outcome.second_best_attained) == (0, 0)


@pytest.mark.parametrize(("within_s", "kept"), [(10.0, True), (0.3, False)])
def test_a_complete_answer_is_scored_by_its_last_token(within_s: float, kept: bool) -> None:
    answer = single_stage("answer", SLO(e2e_ms=1000.0 * within_s))
    load = workload([0.0], [200], [40], (answer,))
    recording = run(load, model=GPU)
    took_s = float(recording.calls["done_s"][0])
    assert 0.3 < took_s < 10.0
    assert (summarize_run(recording).attained == 1) is kept
    assert np.isfinite(recording.token_s).all()
