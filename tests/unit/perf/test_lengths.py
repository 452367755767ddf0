"""Learning answer lengths."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.lengths import EDGES, NUM_BINS, LengthForecast, bin_of, share_left, survives
from tests.builders import EngineBuilder


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


def learnt(lengths: list[int]) -> np.ndarray:
    forecast = LengthForecast(1, 0.7)
    for length in lengths:
        forecast.observe(0, length)
    survival: np.ndarray = forecast.survival()[0]
    return survival


@pytest.mark.parametrize("tokens", [0.0, 4.0, 4.5, 100.0, 4095.0, 4096.0, 1e5, 1e9])
def test_bins_are_found_as_by_searching(tokens: float) -> None:
    assert bin_of(tokens) == np.searchsorted(EDGES, tokens)


def test_a_request_survives_as_often_as_answers_were_longer() -> None:
    engine = EngineBuilder()
    slot = engine.decode(output_tokens=100, max_tokens=10_000)
    recent = np.random.default_rng(0).geometric(1 / 200, 3000)
    survival = learnt(recent.tolist())
    beyond = recent[recent > 100]
    for more in (1.0, 50.0, 200.0, 500.0):
        found = share_left(engine.table.rows, slot, more, survives(survival, 100.0), survival)
        assert found == pytest.approx(float((beyond > 100 + more).mean()), abs=0.06)


def test_a_hint_and_the_cap_are_taken_at_their_word() -> None:
    engine = EngineBuilder()
    slot = engine.decode(output_tokens=10, max_tokens=50)
    survival, rows = learnt([1000] * 500), engine.table.rows
    so_far = survives(survival, 10.0)
    assert share_left(rows, slot, 39.0, so_far, survival) == pytest.approx(1.0, abs=0.01)
    assert share_left(rows, slot, 40.0, so_far, survival) == 0.0
    rows["hint_tokens"][slot] = 30
    assert share_left(rows, slot, 19.0, so_far, survival) == 1.0
    assert share_left(rows, slot, 20.0, so_far, survival) == 0.0
