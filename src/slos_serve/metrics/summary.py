"""Counts and quantiles over many scored requests: per class, and together.

Decides what counts as a miss: a request that was rejected, failed or was cut short missed, whatever it had delivered.
Requests that were promised nothing are shown beside the others and stay out of the total.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from slos_serve.metrics.attainment import Score

TOTAL = "total"
_Z_95 = 1.959963984540054


class Outcome(StrEnum):
    """How a request ended, seen from its sender."""

    COMPLETED = "completed"
    REJECTED = "rejected"
    """Declined by the server: HTTP 429 or 503."""
    ERROR = "error"
    """Any other failure: refused connection, HTTP error, stream cut short, no end within the time limit."""


def _no_gaps() -> NDArray[np.float64]:
    return np.empty(0, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class ScoredRequest:
    """One request as summaries see it.

    Attributes:
        slo_class: name of its class.
        has_slo: something was promised.
        outcome: how it ended.
        score: of the tokens that came, also of a request that failed half-way.
        gaps_s: float [n - 1], times between its tokens; may be left empty when no quantiles of them are wanted.
    """

    slo_class: str
    has_slo: bool
    outcome: Outcome
    score: Score
    gaps_s: NDArray[np.float64] = field(default_factory=_no_gaps)

    @property
    def attained(self) -> bool:
        """It ended well and kept every promise."""
        return self.outcome is Outcome.COMPLETED and self.score.attained

    @property
    def strict(self) -> bool:
        """As :attr:`attained`, with every single token in time."""
        return self.outcome is Outcome.COMPLETED and self.score.strict


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Median and 99th percentile in milliseconds; ``None`` without a sample."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """A class, or all requests that were promised something.

    Attributes:
        name: of the class, or :data:`TOTAL`.
        has_slo: something was promised; without it ``attained`` counts requests that completed.
        requests, completed, attained, strict, rejected, errors: counts; all but the first two and ``attained`` and
            ``strict`` exclude each other.
        attained_low, attained_high: Wilson 95 % interval of attained / requests.
        ttft_ms, tpot_ms, itl_ms: of requests that completed.
        longest_stall_ms: longest gap between two tokens of any request.
        output_tokens: tokens received, failed requests included.
    """

    name: str
    has_slo: bool
    requests: int
    completed: int
    attained: int
    strict: int
    rejected: int
    errors: int
    attained_low: float
    attained_high: float
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    itl_ms: Quantiles
    longest_stall_ms: float
    output_tokens: int

    @property
    def attained_rate(self) -> float:
        """Part of the requests that attained; ``nan`` without requests."""
        return self.attained / self.requests if self.requests else math.nan


def summarize(requests: Iterable[ScoredRequest]) -> list[ClassSummary]:
    """One summary a class in order of first appearance, best effort last, then :data:`TOTAL` of those with an SLO."""
    scored = list(requests)
    names = dict.fromkeys((not request.has_slo, request.slo_class) for request in scored)
    ordered = sorted(names, key=lambda name: name[0])
    rows = [
        _summary(name, not free, [r for r in scored if r.slo_class == name and r.has_slo is not free])
        for free, name in ordered
    ]
    return [*rows, _summary(TOTAL, True, [request for request in scored if request.has_slo])]


def wilson_interval(successes: int, trials: int, z: float = _Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) without trials.

    Unlike the normal approximation it stays within [0, 1] and is honest when all or none succeed.
    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    scale = 1.0 + z * z / trials
    centre = (rate + z * z / (2.0 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1.0 - rate) / trials + z * z / (4.0 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def median_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """Median of a sample and an interval that holds the true one in at least 95 % of cases, by order statistics.

    The sign test turned around: no shape is assumed. Fewer than six values say nothing, so the interval is (0, inf).
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    if count == 0:
        return float("nan"), 0.0, float("inf")
    median = float(np.median(ordered))
    tail, rank = 0.5**count, 0
    while tail <= 0.025:
        rank += 1
        tail += math.comb(count, rank) * 0.5**count
    if rank == 0:
        return median, 0.0, float("inf")
    return median, float(ordered[rank - 1]), float(ordered[count - rank])


def quantiles_ms(values_s: Sequence[float] | NDArray[np.float64]) -> Quantiles:
    """p50 and p99 of seconds, in milliseconds, linear between samples; ``nan`` values are left out."""
    values = np.asarray(values_s, dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Quantiles(None, None)
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return Quantiles(1000.0 * float(p50), 1000.0 * float(p99))


def _summary(name: str, has_slo: bool, requests: Sequence[ScoredRequest]) -> ClassSummary:
    done = [request for request in requests if request.outcome is Outcome.COMPLETED]
    attained = sum(request.attained for request in requests)
    low, high = wilson_interval(attained, len(requests))
    gaps = [request.gaps_s for request in done]
    return ClassSummary(
        name=name,
        has_slo=has_slo,
        requests=len(requests),
        completed=len(done),
        attained=attained,
        strict=sum(request.strict for request in requests),
        rejected=sum(request.outcome is Outcome.REJECTED for request in requests),
        errors=sum(request.outcome is Outcome.ERROR for request in requests),
        attained_low=low,
        attained_high=high,
        ttft_ms=quantiles_ms([request.score.ttft_s for request in done]),
        tpot_ms=quantiles_ms([request.score.tpot_s for request in done]),
        itl_ms=quantiles_ms(np.concatenate(gaps) if gaps else _no_gaps()),
        longest_stall_ms=1000.0 * max((request.score.longest_stall_s for request in requests), default=0.0),
        output_tokens=sum(request.score.num_tokens for request in requests),
    )
