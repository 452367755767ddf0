"""Summaries: what is counted as a miss, the interval, the quantiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from slos_serve.metrics.attainment import StageTarget, score_request
from slos_serve.metrics.summary import (
    TOTAL,
    Outcome,
    ScoredRequest,
    median_interval,
    quantiles_ms,
    summarize,
    wilson_interval,
)


def scored(
    slo_class: str = "chat",
    ttft_s: float = 0.5,
    gap_s: float = 0.05,
    outcome: Outcome = Outcome.COMPLETED,
    has_slo: bool = True,
) -> ScoredRequest:
    """A request of ten tokens under 1 s TTFT and 100 ms TPOT."""
    times = ttft_s + gap_s * np.arange(10)
    target = StageTarget(1.0, 0.1) if has_slo else StageTarget()
    return ScoredRequest(slo_class, has_slo, outcome, score_request(0.0, times, (target,)), np.diff(times))


def test_failures_are_misses_however_fast_they_were() -> None:
    rows = summarize([scored(), scored(outcome=Outcome.REJECTED), scored(outcome=Outcome.ERROR), scored(ttft_s=2.0)])
    chat = rows[0]
    assert (chat.requests, chat.completed, chat.attained, chat.strict) == (4, 2, 1, 1)
    assert (chat.rejected, chat.errors) == (1, 1)
    assert chat.attained_rate == 0.25
    assert chat.attained_low < 0.25 < chat.attained_high


def test_total_leaves_out_requests_without_a_promise() -> None:
    rows = summarize([scored("none", has_slo=False), scored("chat"), scored("code", gap_s=0.2)])
    assert [(row.name, row.requests, row.attained) for row in rows] == [
        ("chat", 1, 1),
        ("code", 1, 0),
        ("none", 1, 1),
        (TOTAL, 2, 1),
    ]
    assert [row.has_slo for row in rows] == [True, True, False, True]


def test_quantiles_are_of_completed_requests() -> None:
    rows = summarize([scored(ttft_s=0.1), scored(ttft_s=0.3), scored(ttft_s=9.0, outcome=Outcome.ERROR)])
    assert rows[0].ttft_ms.p50 == pytest.approx(200.0)
    assert rows[0].ttft_ms.p99 == pytest.approx(298.0)
    assert rows[0].itl_ms.p50 == pytest.approx(50.0)
    assert rows[0].output_tokens == 30


def test_nothing_to_summarize() -> None:
    (total,) = summarize([])
    assert total.name == TOTAL
    assert total.requests == 0
    assert math.isnan(total.attained_rate)
    assert quantiles_ms([math.nan]).p50 is None


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (5, 10), (95, 100), (1, 3)])
def test_wilson_equals_scipy(successes: int, trials: int) -> None:
    reference = binomtest(successes, trials).proportion_ci(method="wilson")
    assert np.allclose(wilson_interval(successes, trials), (reference.low, reference.high), atol=1e-9)


@given(trials=st.integers(0, 5000), part=st.floats(0.0, 1.0))
def test_wilson_holds_the_rate_and_stays_in_range(trials: int, part: float) -> None:
    successes = round(part * trials)
    low, high = wilson_interval(successes, trials)
    assert 0.0 <= low <= high <= 1.0
    if trials:
        assert low <= successes / trials <= high


@given(trials=st.integers(1, 200))
def test_wilson_narrows_with_more_trials(trials: int) -> None:
    low, high = wilson_interval(trials, 2 * trials)
    low_more, high_more = wilson_interval(4 * trials, 8 * trials)
    assert high_more - low_more < high - low


def test_interval_of_the_median_covers_it() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        median, low, high = median_interval(rng.exponential(1.0, 12))
        assert low <= median <= high
        held += low <= np.log(2.0) <= high
    assert 0.95 <= held / 2000 <= 0.975  # exact coverage of ranks 3 and 10 of 12 is 0.961


def test_few_values_say_nothing_about_the_median() -> None:
    assert median_interval([1.0, 2.0, 3.0]) == (2.0, 0.0, float("inf"))
