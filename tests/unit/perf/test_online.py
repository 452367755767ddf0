"""The online correction follows drift, ignores stalls and knows its spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.batch_time import BatchShape
from slos_serve.perf.online import RECENT_SHARE, OnlineCorrection

SHAPE = BatchShape(new_tokens=8, num_seqs=8)


def feed(correction: OnlineCorrection, ratio: float, steps: int, rng: np.random.Generator, noise: float = 0.05) -> None:
    for _ in range(steps):
        predicted_s = float(rng.uniform(0.02, 0.5))
        correction.observe(SHAPE, predicted_s, predicted_s * ratio * float(np.exp(rng.normal(0.0, noise))))


def test_starts_neutral() -> None:
    assert OnlineCorrection().factor == 1.0


def test_stays_near_one_when_the_model_is_right() -> None:
    correction = OnlineCorrection()
    feed(correction, 1.0, 500, np.random.default_rng(0))
    assert correction.factor == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("ratio", [1.5, 0.6, 3.0])
def test_a_lasting_change_is_followed_within_fifty_steps(ratio: float, noise: float) -> None:
    correction, rng = OnlineCorrection(), np.random.default_rng(1)
    feed(correction, 1.0, 200, rng, noise)
    feed(correction, ratio, 50, rng, noise)
    assert correction.factor == pytest.approx(ratio, rel=0.1)


def test_a_change_back_is_followed_too() -> None:
    correction, rng = OnlineCorrection(), np.random.default_rng(2)
    feed(correction, 1.5, 200, rng)
    feed(correction, 1.0, 60, rng)
    assert correction.factor == pytest.approx(1.0, abs=0.08)


def test_slow_drift_is_followed() -> None:
    correction, rng = OnlineCorrection(), np.random.default_rng(3)
    for ratio in np.linspace(1.0, 1.3, 600):
        feed(correction, float(ratio), 1, rng)
    assert correction.factor == pytest.approx(1.3, rel=0.05)


@pytest.mark.parametrize("stall", [10.0, 1000.0])
def test_one_stall_moves_it_by_almost_nothing(stall: float) -> None:
    correction, rng = OnlineCorrection(), np.random.default_rng(4)
    feed(correction, 1.0, 200, rng)
    before = correction.factor
    correction.observe(SHAPE, 0.05, stall * 0.05)
    assert correction.factor == pytest.approx(before, rel=0.005)


@pytest.mark.parametrize("stall_s", [0.3, 10.0])
def test_one_stall_raises_the_margin_little_and_not_for_long(stall_s: float) -> None:
    """Review, A2: after a stall of 10 s every plan was 44 % longer, and still 23 % after 6,000 steps."""
    correction, rng = OnlineCorrection(quantile=0.99), np.random.default_rng(8)
    for _ in range(300):
        correction.observe(SHAPE, 0.03, 0.03 * float(np.exp(rng.normal(0.0, 0.03))))
    before = correction.ratio_quantile
    correction.observe(SHAPE, 0.03, stall_s)
    most = 0.0
    for _ in range(600):
        correction.observe(SHAPE, 0.03, 0.03 * float(np.exp(rng.normal(0.0, 0.03))))
        most = max(most, correction.ratio_quantile)
    assert most < before + 0.03
    assert correction.ratio_quantile < before + 0.01


def test_scattered_stalls_move_it_little() -> None:
    correction, rng = OnlineCorrection(), np.random.default_rng(5)
    for _ in range(50):
        feed(correction, 1.0, 19, rng)
        feed(correction, 10.0, 1, rng)
    assert correction.factor == pytest.approx(1.0, abs=0.05)


def test_the_running_quantile_is_that_of_recent_steps_together() -> None:
    correction, rng = OnlineCorrection(quantile=0.9, initial_ratio_quantile=2.0), np.random.default_rng(6)
    feed(correction, 1.2, 3000, rng, noise=0.1)
    # A running mean of share a has a / (2 - a) of the variance of one step.
    scatter = 0.1 * np.sqrt(RECENT_SHARE / (2.0 - RECENT_SHARE))
    assert correction.ratio_quantile == pytest.approx(np.exp(scatter * 1.2816), abs=0.03)


def test_one_step_strays_further_than_the_mean_of_several() -> None:
    correction, rng = OnlineCorrection(quantile=0.9), np.random.default_rng(6)
    feed(correction, 1.2, 3000, rng, noise=0.1)
    assert correction.ratio_quantile + 0.04 < correction.one_step_quantile < np.exp(0.1 * 1.2816)


def test_slow_steps_that_come_alone_need_less_margin_than_slow_spells() -> None:
    margins = {}
    for spell in (1, 10):
        correction, rng, seen = OnlineCorrection(quantile=0.9), np.random.default_rng(7), []
        for _ in range(3000 // spell):
            feed(correction, 2.0 if rng.random() < 0.15 else 1.0, spell, rng)
            seen.append(correction.ratio_quantile)
        margins[spell] = np.mean(seen[len(seen) // 2 :])
    assert margins[1] < margins[10] and margins[10] > 1.05


@given(steps=st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9)), max_size=60))
def test_the_factor_stays_in_bounds_whatever_comes(steps: list[tuple[float, float]]) -> None:
    correction = OnlineCorrection(low=0.5, high=2.0)
    for predicted_s, measured_s in steps:
        correction.observe(SHAPE, predicted_s, measured_s)
        assert 0.5 <= correction.factor <= 2.0 + 1e-9
        assert np.isfinite(correction.ratio_quantile)


@pytest.mark.parametrize(
    ("shape", "predicted_s", "measured_s"),
    [
        (BatchShape(0), 0.05, 5.0),
        (SHAPE, 0.0, 5.0),
        (SHAPE, 0.05, 0.0),
        (SHAPE, 0.05, -1.0),
        (SHAPE, float("nan"), 1.0),
        (SHAPE, 0.05, float("inf")),
    ],
)
def test_steps_that_teach_nothing_are_ignored(shape: BatchShape, predicted_s: float, measured_s: float) -> None:
    correction = OnlineCorrection()
    correction.observe(shape, predicted_s, measured_s)
    assert correction.factor == 1.0
    assert correction.num_steps == 0


@pytest.mark.parametrize(
    "setting",
    [
        {"time_constant_steps": 1.0},
        {"time_constant_steps": float("nan")},
        {"quantile": 1.0},
        {"low": 0.0},
        {"low": 1.5},
        {"high": 0.5},
        {"initial_ratio_quantile": 0.0},
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(InvalidFieldError):
        OnlineCorrection(**setting)
