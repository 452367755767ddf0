"""What recent arrivals ask for, and the longest step that leaves a newcomer its time."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.request import Status
from slos_serve.perf.step_time import roofline_s
from slos_serve.planning.arrivals import (
    DOUBLES_S,
    LEAST_STEP_FIXED,
    LOAD_OVER_S,
    NO_ARRIVALS,
    STEP_SHARE_OF_TTFT,
    count_arrivals,
    longest_step_s,
)
from tests.builders import EngineBuilder


def test_each_arrival_counts_once() -> None:
    engine = EngineBuilder()
    engine.wait(1000, due_in_s=2.0)
    first = count_arrivals(engine.state(), NO_ARRIVALS)
    again = count_arrivals(engine.state(), first)
    assert first.tightest_s == pytest.approx(2.0)
    assert first.load[0].sum() == pytest.approx(again.load[0].sum())
    assert first.load[0].sum() * LOAD_OVER_S > 1000.0  # attention counts in


def test_what_is_known_fades() -> None:
    engine = EngineBuilder()
    engine.wait(1000, due_in_s=2.0)
    known = count_arrivals(engine.state(), NO_ARRIVALS)
    later = count_arrivals(engine.state()._replace(now_s=engine.now_s + DOUBLES_S), known)
    assert later.tightest_s == pytest.approx(2.0 * known.tightest_s)
    assert later.load.sum() == pytest.approx(known.load.sum() * np.exp(-DOUBLES_S / LOAD_OVER_S))


@pytest.mark.parametrize("runs", [False, True])
def test_after_a_rest_it_is_still_known_how_tight_a_ttft_may_be(runs: bool) -> None:
    """Ten minutes later a long prompt comes first: beside it a short one with 0.5 s would be as early as before."""
    engine = EngineBuilder()
    known = NO_ARRIVALS._replace(newest=6, at_s=engine.now_s - 600.0, tightest_s=0.5)
    engine.table.rows["order"][engine.wait(50_000, due_in_s=60.0)] = 7
    if runs:
        engine.table.rows["order"][engine.decode()] = 3
    tightest_s = count_arrivals(engine.state(), known).tightest_s
    assert tightest_s == pytest.approx(60.0 if runs else 0.5)


def test_best_effort_asks_for_nothing() -> None:
    engine = EngineBuilder()
    slot = engine.wait(1000, due_in_s=2.0)
    engine.table.rows["status"][slot] = Status.BEST_EFFORT
    found = count_arrivals(engine.state(), NO_ARRIVALS)
    assert found.load.sum() == 0.0
    assert found.tightest_s == np.inf
    assert found.newest == engine.table.rows["order"][slot]


@pytest.mark.parametrize(("ahead", "steps_waited_for"), [(False, 1), (True, 2)])
def test_the_steps_a_newcomer_waits_for_leave_it_half_of_its_time(ahead: bool, steps_waited_for: int) -> None:
    state = EngineBuilder().state()._replace(plan_ahead=ahead)
    assert longest_step_s(state, NO_ARRIVALS) == np.inf
    longest_s = longest_step_s(state, NO_ARRIVALS._replace(tightest_s=2.0))
    assert longest_s * steps_waited_for == pytest.approx(2.0 * STEP_SHARE_OF_TTFT)
    least_s = LEAST_STEP_FIXED * roofline_s(state.coefficients, 0.0)
    assert longest_step_s(state, NO_ARRIVALS._replace(tightest_s=1e-3)) == pytest.approx(least_s)
