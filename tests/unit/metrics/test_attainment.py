"""Scoring of one request: hand-worked cases, and what must hold for any token times."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.core.slo import SLO, SLOClass, Stage, single_stage
from slos_serve.metrics.attainment import StageTarget, score_request, stage_starts_of, targets_of

TARGET = (StageTarget(ttft_s=1.0, tpot_s=0.1),)


def even_times(first_s: float, gap_s: float, count: int) -> list[float]:
    """``count`` tokens, ``gap_s`` apart."""
    return [first_s + k * gap_s for k in range(count)]


def test_request_exactly_on_its_targets_attains_strictly() -> None:
    score = score_request(10.0, even_times(11.0, 0.1, 50), TARGET)
    assert score.attained and score.strict
    assert score.ttft_s == pytest.approx(1.0)
    assert score.tpot_s == pytest.approx(0.1)
    assert score.num_tokens == 50


@pytest.mark.parametrize(
    ("first_s", "gap_s", "ttft_met", "tpot_met"),
    [(0.9, 0.05, True, True), (1.01, 0.05, False, True), (0.9, 0.101, True, False), (2.0, 0.2, False, False)],
)
def test_each_promise_is_judged_alone(first_s: float, gap_s: float, ttft_met: bool, tpot_met: bool) -> None:
    score = score_request(0.0, even_times(first_s, gap_s, 10), TARGET)
    assert (score.ttft_met, score.tpot_met) == (ttft_met, tpot_met)
    assert score.attained is (ttft_met and tpot_met)


def test_mean_forgives_a_late_token_and_strict_does_not() -> None:
    score = score_request(0.0, [0.5, 0.75, 0.8, 0.8], TARGET)
    assert score.attained
    assert not score.strict
    assert score.longest_stall_s == pytest.approx(0.25)


def test_tokens_of_one_chunk_share_its_time() -> None:
    early = score_request(0.0, [0.5, 0.6, 0.6, 0.6], TARGET)
    assert early.strict
    late = score_request(0.0, [0.5, 0.8, 0.8, 0.8], TARGET)
    assert late.attained and not late.strict, "the first token of the chunk was due before the chunk came"


@pytest.mark.parametrize("times", [[0.5], [0.5, 0.5]])
def test_too_few_tokens_for_a_mean_count_as_met(times: list[float]) -> None:
    score = score_request(0.0, times, (StageTarget(ttft_s=1.0, tpot_s=1e-6),))
    assert score.attained and score.strict
    assert score.longest_stall_s == 0.0


def test_no_token_misses_a_promise_and_keeps_none() -> None:
    assert not score_request(0.0, [], TARGET).attained
    assert not score_request(0.0, [], (StageTarget(tpot_s=0.1),)).attained
    assert score_request(0.0, [], (StageTarget(),)).attained
    assert math.isnan(score_request(0.0, [], TARGET).ttft_s)


def test_each_stage_is_held_to_its_own_tpot() -> None:
    thinking = even_times(0.5, 0.05, 10)
    answer = even_times(thinking[-1] + 0.3, 0.3, 5)
    targets = (StageTarget(1.0, 0.06), StageTarget(tpot_s=0.35))
    assert score_request(0.0, thinking + answer, targets, [0, 10]).attained
    assert not score_request(0.0, thinking + answer, (targets[0], StageTarget(tpot_s=0.25)), [0, 10]).attained
    assert not score_request(0.0, thinking + answer, (StageTarget(1.0, 0.04), targets[1]), [0, 10]).attained


def test_a_stage_that_was_not_reached_is_not_judged() -> None:
    targets = (StageTarget(1.0, 0.1), StageTarget(tpot_s=1e-6))
    assert score_request(0.0, even_times(0.5, 0.1, 5), targets, [0]).attained


def test_stages_end_by_count_or_by_token() -> None:
    slo = SLO(tpot_ms=100.0)
    by_count = (Stage(slo, max_tokens=3), Stage(slo, max_tokens=2), Stage(slo))
    assert stage_starts_of(by_count, 10) == [0, 3, 5]
    assert stage_starts_of(by_count, 3) == [0]
    by_token = (Stage(slo, end_token_id=7, max_tokens=4), Stage(slo))
    assert stage_starts_of(by_token, 6, [1, 7, 2, 7, 3, 3]) == [0, 2]
    assert stage_starts_of(by_token, 6, [1, 1, 1, 1, 1, 1]) == [0, 4]
    assert stage_starts_of((Stage(slo, end_token_id=7), Stage(slo)), 6) == [0]


def test_targets_resolve_a_slowdown_and_its_floor() -> None:
    chat = single_stage("chat", SLO(ttft_slowdown=3.0, ttft_floor_ms=500.0, tpot_ms=80.0))
    (slow,) = targets_of(chat, 0.4)
    assert (slow.ttft_s, slow.tpot_s) == pytest.approx((1.2, 0.08))
    assert targets_of(chat, 0.1)[0].ttft_s == pytest.approx(0.5)
    assert targets_of(None, 0.1) == (StageTarget(math.inf, math.inf),)
    staged = SLOClass("think", (Stage(SLO(ttft_ms=900.0, tpot_ms=50.0), 5), Stage(SLO(tpot_ms=100.0))))
    assert targets_of(staged, 0.1) == (StageTarget(0.9, 0.05), StageTarget(math.inf, 0.1))


token_times = st.lists(st.floats(0.0, 5.0), min_size=1, max_size=60).map(np.cumsum)


@given(times=token_times, ttft_s=st.floats(0.01, 10.0), tpot_s=st.floats(0.001, 2.0))
def test_strict_implies_attained(times: np.ndarray, ttft_s: float, tpot_s: float) -> None:
    score = score_request(0.0, times, (StageTarget(ttft_s, tpot_s),))
    assert score.attained or not score.strict


@given(times=token_times, tpot_s=st.floats(0.001, 2.0), at=st.integers(1, 60), by_s=st.floats(0.0, 1.0))
def test_delivering_a_token_later_never_helps(times: np.ndarray, tpot_s: float, at: int, by_s: float) -> None:
    targets = (StageTarget(2.0, tpot_s),)
    later = times.copy()
    later[at:] += by_s
    assert score_request(0.0, times, targets).strict or not score_request(0.0, later, targets).strict
    assert score_request(0.0, times, targets).attained or not score_request(0.0, later, targets).attained


@given(times=token_times, shift_s=st.floats(-50.0, 50.0))
def test_only_time_differences_count(times: np.ndarray, shift_s: float) -> None:
    here = score_request(0.0, times, TARGET)
    there = score_request(shift_s, times + shift_s, TARGET)
    assert there.ttft_s == pytest.approx(here.ttft_s, abs=1e-6)
    assert there.longest_stall_s == pytest.approx(here.longest_stall_s, abs=1e-6)
