"""Two servers beside each other: the same requests, one server at a time, in turns.

Each round sends one seed's requests to both; the server that is first changes from round to round, so that what drifts
on the machine hits both. A ratio is the median over rounds of B over A, with the interval that holds the true median in
95 % of cases (order statistics; it takes six rounds).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from slos_serve.bench.report import throughput_json
from slos_serve.bench.run import BenchRun, BenchSettings
from slos_serve.metrics.summary import ClassSummary, median_interval, wilson_interval

COMPARISON_FORMAT = "slos-serve-comparison/1"
ENOUGH_ROUNDS = 6
Run = Callable[[BenchSettings], Awaitable[BenchRun]]
Row = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Measured:
    """One server's part of one round.

    Attributes:
        requests, kept: requests with a promise, and those that kept every one.
        output_tokens_per_s: until the last answer.
        ttft_p50_ms, tpot_p50_ms: of completed requests; ``nan`` without one.
        errors: failed requests, refusals not counted.
    """

    requests: int
    kept: int
    output_tokens_per_s: float
    ttft_p50_ms: float
    tpot_p50_ms: float
    errors: int

    @property
    def kept_share(self) -> float:
        """Part of the requests with a promise that kept it; ``nan`` without one."""
        return self.kept / self.requests if self.requests else math.nan


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median over rounds, and the interval that holds the true one in 95 % of cases."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rounds of two servers, in order."""

    a: Sequence[Measured]
    b: Sequence[Measured]

    def ratio(self, name: str) -> Ratio:
        """B over A of a field of :class:`Measured`; rounds in which one has no number are left out."""
        pairs = [(getattr(one, name), getattr(other, name)) for one, other in zip(self.a, self.b, strict=True)]
        return Ratio(*median_interval([b / a for a, b in pairs if a > 0.0 and math.isfinite(b)]))

    def more_kept(self) -> Ratio:
        """Promises kept by B less those by A, in points of a hundred requests."""
        pairs = [(one.kept_share, other.kept_share) for one, other in zip(self.a, self.b, strict=True)]
        differences = [100.0 * (b - a) for a, b in pairs if math.isfinite(b - a)]
        found = Ratio(*median_interval(differences))
        return replace(found, low=-math.inf) if len(differences) < ENOUGH_ROUNDS else found

    def as_json(self, urls: tuple[str, str]) -> dict[str, Any]:
        """Both sides, and the ratios; an open end of an interval is ``null``."""
        ratios = {name: _plain(self.ratio(name)) for name in ("output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")}
        sides = {
            key: {"base_url": url, "requests": sum(one.requests for one in side), "kept": sum(one.kept for one in side)}
            for key, url, side in zip("ab", urls, (self.a, self.b), strict=True)
        }
        more = _plain(self.more_kept())
        return {"format": COMPARISON_FORMAT, "rounds": len(self.a), **sides, "more_kept_points": more, "ratios": ratios}

    def rows(self) -> list[Row]:
        """What is compared, A, B, and B against A."""
        more = self.more_kept()
        found: list[Row] = [("promises kept", _kept(self.a), _kept(self.b), _told(more, "{:+.1f} points"))]
        for name, label in (
            ("output_tokens_per_s", "output tokens/s"),
            ("ttft_p50_ms", "TTFT p50 ms"),
            ("tpot_p50_ms", "TPOT p50 ms"),
        ):
            sides = [median_interval([getattr(one, name) for one in side])[0] for side in (self.a, self.b)]
            found.append((label, f"{sides[0]:.1f}", f"{sides[1]:.1f}", _told(self.ratio(name), "{:.2f} times")))
        failed = [sum(one.errors for one in side) for side in (self.a, self.b)]
        found.append(("errors", str(failed[0]), str(failed[1]), ""))
        return found

    def table(self, urls: tuple[str, str]) -> Table:
        """For people."""
        table = Table(title=f"A: {urls[0]}, B: {urls[1]}, {len(self.a)} rounds", title_justify="left")
        for name in ("", "A", "B", "B against A (95 %)"):
            table.add_column(name, justify="right" if name else "left")
        for row in self.rows():
            table.add_row(*row)
        return table


async def compared(settings: BenchSettings, run_a: Run, run_b: Run, rounds: int) -> Comparison:
    """Send ``rounds`` seeds to both servers in turns, ``settings.seed`` first."""
    sides: dict[str, list[Measured]] = {"a": [], "b": []}
    runs = {"a": run_a, "b": run_b}
    for number in range(rounds):
        seeded = replace(settings, seed=settings.seed + number)
        for key in ("a", "b") if number % 2 == 0 else ("b", "a"):
            sides[key].append(measured_of(await runs[key](seeded)))
    return Comparison(sides["a"], sides["b"])


def measured_of(run: BenchRun) -> Measured:
    """What of a run is compared."""
    rows = run.summary
    every: Sequence[ClassSummary] = rows[:-1]
    completed = [row for row in every if row.completed]
    return Measured(
        requests=rows[-1].requests,
        kept=rows[-1].attained,
        output_tokens_per_s=throughput_json(run.load)["output_tokens_per_s"],
        ttft_p50_ms=_mean_p50([(row.completed, row.ttft_ms.p50) for row in completed]),
        tpot_p50_ms=_mean_p50([(row.completed, row.tpot_ms.p50) for row in completed]),
        errors=sum(row.errors for row in every),
    )


def _mean_p50(medians: Sequence[tuple[int, float | None]]) -> float:
    """Mean of the classes' medians by their requests; ``nan`` without one."""
    known = [(count, value) for count, value in medians if value is not None]
    total = sum(count for count, _ in known)
    return sum(count * value for count, value in known) / total if total else math.nan


def _kept(side: Sequence[Measured]) -> str:
    kept, requests = sum(one.kept for one in side), sum(one.requests for one in side)
    if not requests:
        return "-"
    low, high = wilson_interval(kept, requests)
    return f"{kept}/{requests} ({low:.0%} to {high:.0%})"


def _told(ratio: Ratio, form: str) -> str:
    if not math.isfinite(ratio.median):
        return "-"
    known = math.isfinite(ratio.high) and math.isfinite(ratio.low)
    interval = f"{ratio.low:.2f} to {ratio.high:.2f}" if known else f"no interval below {ENOUGH_ROUNDS} rounds"
    return f"{form.format(ratio.median)} ({interval})"


def _plain(ratio: Ratio) -> dict[str, float | None]:
    values = {"median": ratio.median, "low": ratio.low, "high": ratio.high}
    return {name: round(value, 4) if math.isfinite(value) else None for name, value in values.items()}
