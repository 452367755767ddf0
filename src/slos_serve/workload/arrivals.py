"""When requests arrive: ``poisson``, ``gamma:CV``, ``burst:FACTOR``, ``day``, and two fitted to Azure's traces.

``azure-code`` alternates bursts and silences: size, speed and following silence come from a table of the trace's
bursts, drawn in short runs because neighbours resemble each other; gaps within a burst come from quantiles.
``azure-conv`` is a Poisson process whose rate drifts (an Ornstein-Uhlenbeck process in the logarithm). A rate other
than the trace's stretches or shrinks its clock, as replaying a trace faster does: the CV stays, and peaks are the
trace's at its own time scale. ``day`` is a Poisson process whose rate follows a whole day of a production service over
the run, however long that is. The mean rate of a sample is exactly the rate asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import check_number
from slos_serve.workload.lengths import PROBABILITIES, load_table

Floats = NDArray[np.float64]
DRIFT_STEP_S = 1.0
BURSTS_A_RUN = 8
LEAST_RATE_RPS = 1e-9  # with less, so much time passes that a step is lost in its rounding
ARRIVAL_NAMES = ("poisson", "azure-conv", "azure-code", "gamma:CV", "burst:FACTOR", "day")
# Where in a run of ``burst:FACTOR`` the burst begins and ends, as parts of its time.
BURST_FROM, BURST_TO = 0.4, 0.6


def arrival_times(name: str, rate_rps: float, count: int, random: Generator) -> Floats:
    """float64 [count], rising, from 0 on.

    Args:
        name: one of :data:`ARRIVAL_NAMES`, with a number for CV or FACTOR.
        rate_rps: mean requests a second.
        count: how many.
        random: source of randomness; equal streams give equal arrivals up to the scale of time.

    Raises:
        InvalidFieldError: unknown process, or a rate or CV out of range.
    """
    check_number("rate", rate_rps, low=LEAST_RATE_RPS, high=1e6, low_included=True)
    if count <= 0:
        return np.empty(0)
    times = _process(name)(count + 1, random)
    times = times - times[0]
    return np.asarray(times[:-1] * (count / rate_rps / times[-1]))


def _process(name: str) -> Callable[[int, Generator], Floats]:
    kind, _, parameter = name.partition(":")
    if kind == "poisson" and not parameter:
        return lambda count, random: np.cumsum(random.exponential(size=count))
    if kind == "gamma":
        return partial(_gamma, _parameter(name, parameter, "CV", 0.0, 100.0))
    if kind == "burst":
        return partial(_one_burst, _parameter(name, parameter, "FACTOR", 1.0, 10_000.0))
    if name == "day":
        return partial(_day, np.asarray(load_table("day_arrivals")["relative_rate"]))
    if name in ("azure-conv", "azure-code"):
        table = load_table(name.replace("-", "_") + "_arrivals")
        return partial(_bursts if table["process"] == "on-off" else _drift, table)
    raise InvalidFieldError("arrivals", name, f"one of {', '.join(ARRIVAL_NAMES)}")


def _parameter(name: str, text: str, what: str, low: float, high: float) -> float:
    kind = name.partition(":")[0]
    try:
        value = float(text)
    except ValueError as fault:
        raise InvalidFieldError("arrivals", name, f"{kind}:{what} with a number, such as {kind}:2") from fault
    return check_number(f"arrivals {what}", value, low=low, high=high)


def _one_burst(factor: float, count: int, random: Generator) -> Floats:
    """A Poisson process whose rate is ``factor`` times as high for a fifth of its time."""
    expected = np.array([0.0, BURST_FROM, BURST_FROM + factor * (BURST_TO - BURST_FROM), 0.0])
    expected[-1] = expected[-2] + 1.0 - BURST_TO
    return _poisson(expected, np.array([0.0, BURST_FROM, BURST_TO, 1.0]), count, random)


def _day(relative_rate: Floats, count: int, random: Generator) -> Floats:
    """A Poisson process whose rate is that of each window of a day, the day taking all of the run."""
    expected = np.concatenate((np.zeros(1), np.cumsum(relative_rate)))
    return _poisson(expected, np.linspace(0.0, 1.0, len(expected)), count, random)


def _poisson(expected: Floats, at: Floats, count: int, random: Generator) -> Floats:
    """A Poisson process of which ``expected`` (in any unit) have come up to each moment ``at``."""
    came = np.cumsum(random.exponential(size=count))
    return np.asarray(np.interp(came / came[-1] * expected[-1], expected, at))


def _gamma(cv: float, count: int, random: Generator) -> Floats:
    shape = 1.0 / (cv * cv)
    return np.cumsum(random.gamma(shape, 1.0 / shape, size=count))


def _drift(table: dict[str, Any], count: int, random: Generator) -> Floats:
    rate, sigma, decay_s = float(table["rate_rps"]), float(table["sigma"]), float(table["decay_s"])
    times = np.empty(0)
    keep = np.exp(-DRIFT_STEP_S / decay_s)
    level = random.standard_normal()
    while len(times) < count:
        steps = int(1.5 * (count - len(times)) / rate / DRIFT_STEP_S) + 60
        noise = random.standard_normal(steps) * np.sqrt(1.0 - keep * keep)
        levels = np.empty(steps)
        for i in range(steps):
            level = keep * level + noise[i]
            levels[i] = level
        start_s = len_s(times, DRIFT_STEP_S)
        expected = rate * DRIFT_STEP_S * np.exp(sigma * levels - 0.5 * sigma * sigma)
        arrivals = random.poisson(expected)
        begin = start_s + DRIFT_STEP_S * np.repeat(np.arange(steps), arrivals)
        times = np.concatenate((times, np.sort(begin + DRIFT_STEP_S * random.random(len(begin)))))
    return np.asarray(times[:count])


def len_s(times: Floats, step_s: float) -> float:
    """End of the last whole step that ``times`` reach into."""
    return float(np.ceil(times[-1] / step_s) * step_s) if len(times) else 0.0


def _bursts(table: dict[str, Any], count: int, random: Generator) -> Floats:
    sizes = np.asarray(table["burst_size"])
    parts: list[Floats] = []
    clock_s, total = 0.0, 0
    while total < count:
        first = int(random.integers(len(sizes)))
        for row in range(first, min(first + BURSTS_A_RUN, len(sizes))):
            burst = clock_s + _burst(table, row, int(sizes[row]), random)
            parts.append(burst)
            total += len(burst)
            clock_s = float(burst[-1]) + float(table["silence_s"][row])
    return np.asarray(np.concatenate(parts)[:count])


def _burst(table: dict[str, Any], row: int, size: int, random: Generator) -> Floats:
    """Arrivals of one burst from 0 on; its length is the table's, the gaps in it are drawn."""
    if size == 1:
        return np.zeros(1)
    gaps = np.interp(random.random(size - 1), PROBABILITIES, np.asarray(table["relative_gap"]))
    gaps *= float(table["mean_gap_s"][row]) * (size - 1) / gaps.sum()
    return np.concatenate((np.zeros(1), np.cumsum(gaps)))
