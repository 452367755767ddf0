"""Arrival processes: exact rates, same seeds, and the traces' burstiness within 20 %."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.workload.arrivals import arrival_times
from slos_serve.workload.lengths import load_table

# Of the recorded hour: requests, requests/s, CV of gaps, peak-to-mean of counts in windows of 1, 10 and 60 s.
AZURE = {
    "azure-conv": (19366, 5.530, 1.094, {1.0: 2.893, 10.0: 1.772, 60.0: 1.528}),
    "azure-code": (8819, 2.566, 13.151, {1.0: 26.104, 10.0: 12.740, 60.0: 4.104}),
}


def _cv(times: NDArray[np.float64]) -> float:
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean())


def _peak(times: NDArray[np.float64], window_s: float) -> float:
    counts = np.histogram(times, np.arange(0.0, times[-1] + window_s, window_s))[0]
    return float(counts.max() / (len(times) * window_s / times[-1]))


@pytest.mark.parametrize("name", sorted(AZURE))
def test_azure_hours_are_reproduced(name: str) -> None:
    count, rate, cv, peaks = AZURE[name]
    hours = [arrival_times(name, rate, count, np.random.default_rng(seed)) for seed in range(40)]
    assert np.mean([_cv(hour) for hour in hours]) == pytest.approx(cv, rel=0.2)
    for window_s, peak in peaks.items():
        assert np.mean([_peak(hour, window_s) for hour in hours]) == pytest.approx(peak, rel=0.2), window_s


@pytest.mark.parametrize("name", ["poisson", "azure-conv", "azure-code", "gamma:3", "burst:10"])
def test_rate_is_exact_and_scales_the_clock(name: str) -> None:
    slow = arrival_times(name, 1.0, 2000, np.random.default_rng(1))
    fast = arrival_times(name, 4.0, 2000, np.random.default_rng(1))
    assert np.all(np.diff(slow) >= 0.0) and slow[0] == 0.0
    assert len(slow) / slow[-1] == pytest.approx(1.0, rel=0.15)
    np.testing.assert_allclose(slow, 4.0 * fast, rtol=1e-12)


def test_gamma_has_the_cv_asked_for() -> None:
    assert _cv(arrival_times("gamma:3", 1.0, 100_000, np.random.default_rng(0))) == pytest.approx(3.0, rel=0.05)
    assert _cv(arrival_times("poisson", 1.0, 100_000, np.random.default_rng(0))) == pytest.approx(1.0, rel=0.02)


def test_a_burst_is_as_many_times_as_fast_as_what_is_around_it() -> None:
    times = arrival_times("burst:10", 2.0, 20_000, np.random.default_rng(0))
    end_s = times[-1]
    inside = np.count_nonzero((times > 0.4 * end_s) & (times < 0.6 * end_s)) / 0.2
    outside = np.count_nonzero((times < 0.4 * end_s) | (times > 0.6 * end_s)) / 0.8
    assert inside / outside == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("name", ["bursty", "gamma", "gamma:x", "gamma:-1", "poisson:2", "burst", "burst:0.5"])
def test_unknown_processes_are_named(name: str) -> None:
    with pytest.raises(InvalidFieldError, match="arrivals"):
        arrival_times(name, 1.0, 10, np.random.default_rng(0))


def test_rate_out_of_range() -> None:
    with pytest.raises(InvalidFieldError, match="rate"):
        arrival_times("poisson", 0.0, 10, np.random.default_rng(0))


def test_a_day_follows_its_curve_over_any_run() -> None:
    relative = np.asarray(load_table("day_arrivals")["relative_rate"])
    times = arrival_times("day", 5.0, 40_000, np.random.default_rng(1))
    counts = np.histogram(times, np.linspace(0.0, 40_000 / 5.0, 25))[0] / (40_000 / 24)
    np.testing.assert_allclose(counts, relative.reshape(24, 6).mean(1), rtol=0.12)
    assert counts.max() > 2.5 * counts.min()
