"""Learning answer lengths."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.planning.lengths import EDGES, NUM_BINS, LengthForecast


def forecast_after(lengths: list[int], generated: int, quantile: float = 0.5) -> float:
    forecast = LengthForecast(1, quantile)
    for length in lengths:
        forecast.observe(0, length)
    bin_index = int(np.searchsorted(EDGES, generated))
    return float(forecast.table()[0, min(bin_index, NUM_BINS - 1)])


def test_the_median_of_what_was_seen_wins_over_the_prior() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(60), 0.5, 400).astype(int).tolist()
    assert forecast_after(lengths, 0) == pytest.approx(np.median(lengths), rel=0.15)


def test_the_forecast_is_conditional_on_what_is_generated() -> None:
    lengths = [20] * 300 + [1000] * 100
    assert forecast_after(lengths, 0) < 40
    assert forecast_after(lengths, 100) == pytest.approx(1000, rel=0.15)


def test_past_everything_seen_it_still_looks_ahead() -> None:
    assert forecast_after([20] * 2000, 5000) > 5000


def test_old_answers_fade() -> None:
    forecast = LengthForecast(1, 0.5, half_life=50.0)
    for length in [1000] * 300 + [50] * 300:
        forecast.observe(0, length)
    assert forecast.table()[0, 0] == pytest.approx(50, rel=0.15)


def test_classes_learn_apart() -> None:
    forecast = LengthForecast(2, 0.5)
    for _ in range(200):
        forecast.observe(0, 10)
        forecast.observe(1, 800)
    table = forecast.table()
    assert table[0, 0] < 20 < 600 < table[1, 0]


def test_a_quantile_outside_the_open_interval_is_refused() -> None:
    with pytest.raises(InvalidFieldError, match="length_quantile"):
        LengthForecast(1, 1.0)
