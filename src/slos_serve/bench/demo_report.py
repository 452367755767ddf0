"""The demo's result: one JSON, one table, and the claims it either bears out or does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from slos_serve.bench.demo_events import SchedulerEvents
from slos_serve.bench.demo_plan import DemoPlan
from slos_serve.bench.record import write_record
from slos_serve.bench.report import class_json, client_json, error_counts, throughput_json
from slos_serve.bench.requests import LoadResult
from slos_serve.bench.scoring import score_responses, targets_for
from slos_serve.core.verdict import Verdict
from slos_serve.metrics.summary import (
    TOTAL,
    Outcome,
    Quantiles,
    ScoredRequest,
    median_interval,
    quantiles_ms,
    summarize,
)
from slos_serve.perf.batch_time import BatchTimeModel

PHASES = ("calm", "burst")
STOCK, OURS = "stock", "slos_serve"
# A promised pace needs a step every so often, each with its fixed cost; stock's steps are as long as they like. On this
# engine that left 0.76 and 0.80 of its tokens a second in two runs (benchmarks/LOG.md).
LEAST_BURST_SPEED = 0.75
# What is more than a client was told, by what that was.
_BETTER = {"best-effort": ("admitted", "second-best"), "second-best": ("admitted",)}
SIDE_TITLES: Mapping[str, str] = {STOCK: "stock vLLM", OURS: "with slos-serve"}


@dataclass(frozen=True)
class SideRun:
    """One side of the demo.

    Attributes:
        loads: result of each phase by name.
        scored: scores of each phase, in the order of its responses.
        events: what the scheduler wrote; ``None`` for stock vLLM, which promises nothing.
        class_names: the classes, in the order in which they are shown.
    """

    loads: Mapping[str, LoadResult]
    scored: Mapping[str, Sequence[ScoredRequest]]
    events: SchedulerEvents | None
    class_names: tuple[str, ...]


def side_run(
    loads: Mapping[str, LoadResult], plan: DemoPlan, model: BatchTimeModel, events: SchedulerEvents | None
) -> SideRun:
    """Score one side."""
    scored = {phase: score_responses(load.responses, plan.classes, model) for phase, load in loads.items()}
    return SideRun(loads, scored, events, tuple(slo_class.name for slo_class in plan.classes))


def phase_json(side: SideRun, phase: str) -> dict[str, Any]:
    """Counts of one phase on one side. ``requests`` are those with an SLO; each is admitted, given a weaker promise
    (``second_best``, kept by what the engine measured), or best effort.

    On the stock side all count as admitted: it promises the same to everybody.
    """
    load, scored = side.loads[phase], side.scored[phase]
    rows = summarize(scored)
    total, found = rows[-1], {row.name: row for row in rows if row.name != TOTAL and row.has_slo}
    classes = {name: found[name] for name in side.class_names if name in found}
    pairs = list(zip(load.responses, scored, strict=True))
    promised = [(response.request.request_id, score) for response, score in pairs if score.has_slo]
    free = [score for score in scored if not score.has_slo]
    kept = [score for request_id, score in promised if _admitted(side.events, request_id)]
    weaker = [request_id for request_id, _ in promised if _verdict(side.events, request_id) == Verdict.SECOND_BEST]
    given = (Verdict.ADMITTED, Verdict.SECOND_BEST)
    left = [score for request_id, score in promised if _verdict(side.events, request_id) not in given]
    return {
        "requests": total.requests,
        "attained": total.attained,
        "attained_rate": total.attained_rate if total.requests else None,
        "attained_interval": [total.attained_low, total.attained_high],
        "attained_by_class": {name: row.attained for name, row in classes.items()},
        "requests_by_class": {name: row.requests for name, row in classes.items()},
        "strict": total.strict,
        "admitted": len(kept),
        "admitted_attained": sum(score.attained for score in kept),
        "admitted_strict": sum(score.strict for score in kept),
        "second_best": {
            "given": len(weaker),
            "kept": sum(side.events.kept.get(request_id, False) for request_id in weaker) if side.events else 0,
        },
        "best_effort": len(left),
        "best_effort_completed": sum(score.outcome is Outcome.COMPLETED for score in left),
        "best_effort_attained": sum(score.attained for score in left),
        "best_effort_ttft_ms": asdict(quantiles_ms([score.score.ttft_s for score in left])),
        "no_slo": {
            "requests": len(free),
            "completed": sum(score.outcome is Outcome.COMPLETED for score in free),
        },
        "verdicts": verdicts_told(side, phase),
        "rejected": total.rejected,
        "errors": total.errors,
        "ttft_ms": asdict(total.ttft_ms),
        "tpot_ms": asdict(total.tpot_ms),
        "longest_stall_ms": total.longest_stall_ms,
        "planner_ms": asdict(_milliseconds(side.events.plan_ms.get(phase, []) if side.events else [])),
        "added_ms": asdict(_milliseconds(side.events.added_ms.get(phase, []) if side.events else [])),
        "fallback_steps": side.events.fallbacks.get(phase, 0) if side.events else 0,
        "throughput": throughput_json(load),
        "classes": {name: class_json(row) for name, row in classes.items()},
        "error_messages": error_counts(load.responses),
        "client": client_json(load),
    }


def verdicts_told(side: SideRun, phase: str) -> dict[str, dict[str, int]]:
    """What answers' heads said of requests with an SLO, and what the engine did with those; stock says nothing."""
    counts: dict[str, dict[str, int]] = {}
    for response, score in zip(side.loads[phase].responses, side.scored[phase], strict=True):
        if side.events is None or not score.has_slo or response.verdict is None:
            continue
        did = side.events.verdicts.get(response.request.request_id, "nothing")
        row = counts.setdefault(response.verdict, {})
        row[did] = row.get(did, 0) + 1
    return counts


def record_side(path: Path, side: SideRun, plan: DemoPlan, model: BatchTimeModel, header: Mapping[str, Any]) -> None:
    """Write every request of one side, calm phase then burst on one clock, as ``slos-serve replay`` reads it."""
    load = side.loads["calm"].then(side.loads["burst"])
    scored = [*side.scored["calm"], *side.scored["burst"]]
    targets = [targets_for(response, plan.classes, model) for response in load.responses]
    verdicts = side.events.verdicts if side.events is not None else None
    write_record(path, header, load, scored, targets, verdicts)


def demo_json(sides: Mapping[str, SideRun], setup: Mapping[str, Any]) -> dict[str, Any]:
    """The whole result.

    ``ratio`` is attained requests of the burst, ours over stock; a stock engine that attains none counts as one.
    ``calm_ttft_ratio`` sets the two answers to each calm request side by side: TTFT of ours over that of stock.
    """
    result: dict[str, Any] = {
        name: {phase: phase_json(side, phase) for phase in PHASES} for name, side in sides.items()
    }
    stock, ours = (result[name]["burst"]["attained"] for name in (STOCK, OURS))
    ratios = calm_ttft_ratios(sides)
    median, low, high = median_interval(ratios)
    interval = [low, high] if math.isfinite(high) else None
    paired = {"pairs": len(ratios), "median": median if ratios else None, "interval": interval}
    return {**result, "ratio": ours / max(stock, 1), "calm_ttft_ratio": paired, "setup": dict(setup)}


def calm_ttft_ratios(sides: Mapping[str, SideRun]) -> list[float]:
    """TTFT of ours over stock's, for each calm request that carried an SLO and got a first token on both sides.

    The p50s of a dozen prompts of all lengths jump from one prompt to the next; the same prompt twice does not.
    """
    ttft_s: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        pairs = zip(side.loads["calm"].responses, side.scored["calm"], strict=True)
        ttft_s[name] = {one.request.request_id: score.score.ttft_s for one, score in pairs if score.has_slo}
    shared = [key for key in ttft_s[STOCK] if key in ttft_s[OURS]]
    ratios = [ttft_s[OURS][key] / ttft_s[STOCK][key] for key in shared]
    return [ratio for ratio in ratios if np.isfinite(ratio)]


def demo_table(result: Mapping[str, Any]) -> Table:
    """Both sides and phases in one table, a row a class."""
    table = Table(title="Requests that kept their latency promises", title_justify="left")
    table.add_column("phase")
    table.add_column("class")
    for side in (STOCK, OURS):
        for name in ("attained", "TTFT p50/p99 s", "TPOT p50/p99 ms"):
            table.add_column(f"{SIDE_TITLES[side]}\n{name}" if name == "attained" else f"\n{name}", justify="right")
    for phase in PHASES:
        for name in result[STOCK][phase]["classes"]:
            cells = [cell for side in (STOCK, OURS) for cell in _cells(result[side][phase]["classes"].get(name))]
            table.add_row(phase, name, *cells)
        cells = [cell for side in (STOCK, OURS) for cell in _cells(result[side][phase])]
        table.add_row(phase, "all with an SLO", *cells, style="bold")
        kinds = {"every token in time": _strict, "output tokens/s": _speed, "verdict told": _told}
        if result[OURS][phase]["second_best"]["given"]:
            kinds["weaker promise"] = _weaker
        for name, kind in {**kinds, "best effort": _left}.items():
            cells = [cell for side in (STOCK, OURS) for cell in kind(result[side][phase])]
            table.add_row(phase, name, *cells, end_section=kind is _left)
    return table


def claims(result: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What the demo is there to show, each with whether this run bears it out."""
    stock, ours = result[STOCK], result[OURS]
    calm_s, calm_o, burst_o = stock["calm"], ours["calm"], ours["burst"]
    ratio = result["ratio"]
    admitted_rate = _rate(burst_o["admitted_attained"], burst_o["admitted"])
    completed = sum(ours[p]["best_effort_completed"] + ours[p]["no_slo"]["completed"] for p in PHASES)
    best_effort = sum(ours[p]["best_effort"] + ours[p]["no_slo"]["requests"] for p in PHASES)
    speed = _over(calm_o["throughput"]["output_tokens_per_s"], calm_s["throughput"]["output_tokens_per_s"])
    calm_rates = (_rate(calm_s["attained"], calm_s["requests"]), _rate(calm_o["attained"], calm_o["requests"]))
    times = f"{ratio:.2f} times as many requests attain as on stock vLLM"
    counts = f"{burst_o['attained']} against {stock['burst']['attained']} of {burst_o['requests']}"
    counts += f"; 95 % intervals {_interval(burst_o)} and {_interval(stock['burst'])}"
    goodput = f"burst: {times} ({counts}; wanted: 1.3 times)"
    kept = f"burst: {admitted_rate:.1%} of the {burst_o['admitted']} admitted requests attain (wanted: 95 %)"
    every_token = _rate(burst_o["admitted_strict"], burst_o["admitted"])
    strict = f"burst: {every_token:.1%} of the admitted requests get every token in time (wanted: 90 %)"
    burst_speed = _over(*(side["burst"]["throughput"]["output_tokens_per_s"] for side in (ours, stock)))
    work = f"burst: output tokens a second {burst_speed:.2f} times those of stock vLLM (wanted: {LEAST_BURST_SPEED:g})"
    ended = f"both phases: {completed} of {best_effort} best-effort requests complete (wanted: all)"
    calm = f"calm: {calm_rates[0]:.1%} attain on stock vLLM, {calm_rates[1]:.1%} on ours (wanted: 95 % on both)"
    paired, low, high = _paired(result["calm_ttft_ratio"])
    medians = f"TTFT {paired:.2f} times (median over the same requests, 95 % interval {low:.2f} to {high:.2f})"
    cost = f"calm: {medians}, throughput {speed:.2f} times that of stock vLLM"
    cost += " (wanted: within 10 %)"
    return [
        *_weaker_claims(burst_o),
        (goodput, ratio >= 1.3),
        (kept, admitted_rate >= 0.95),
        (strict, every_token >= 0.9),
        (work, burst_speed >= LEAST_BURST_SPEED),
        (ended, completed == best_effort),
        (calm, min(calm_rates) >= 0.95),
        (cost, paired <= 1.1 and speed >= 0.9),
    ]


def _paired(found: Mapping[str, Any]) -> tuple[float, float, float]:
    """Median of a ratio over pairs (``inf`` without any) and its interval; with few pairs the median is all of it."""
    median = found["median"] or float("inf")
    return median, *(found["interval"] or (median, median))


def _weaker_claims(burst: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Of a burst in which weaker promises were given: who got some promise, and how many were kept."""
    weaker = burst["second_best"]
    if not weaker["given"]:
        return []
    given, kept = burst["admitted"] + weaker["given"], burst["admitted_attained"] + weaker["kept"]
    some, share = _rate(given, burst["requests"]), _rate(kept, given)
    return [
        (f"burst: {some:.1%} of the requests get some promise (wanted: 85 %)", some >= 0.85),
        (f"burst: {share:.1%} of the {given} promises given are kept (wanted: 95 %)", share >= 0.95),
    ]


def _verdict(events: SchedulerEvents | None, request_id: str) -> str | None:
    """What a request was given; stock promises the same to everybody."""
    return Verdict.ADMITTED if events is None else events.verdicts.get(request_id)


def _admitted(events: SchedulerEvents | None, request_id: str) -> bool:
    return _verdict(events, request_id) == Verdict.ADMITTED


def _milliseconds(values_ms: Sequence[float]) -> Quantiles:
    return quantiles_ms([value / 1000.0 for value in values_ms])


def _rate(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _over(ours: float | None, stock: float | None) -> float:
    return ours / stock if ours is not None and stock else float("inf")


def _interval(phase: Mapping[str, Any]) -> str:
    low, high = phase["attained_interval"]
    return f"{low:.0%} to {high:.0%}"


def _strict(phase: Mapping[str, Any]) -> tuple[str, str, str]:
    return (f"{phase['strict']}/{phase['requests']}", "", "")


def _speed(phase: Mapping[str, Any]) -> tuple[str, str, str]:
    return (f"{phase['throughput']['output_tokens_per_s']:.0f}", "", "")


def _weaker(phase: Mapping[str, Any]) -> tuple[str, str, str]:
    """Weaker promises that were kept, of those given."""
    found = phase["second_best"]
    return (f"{found['kept']}/{found['given']} kept" if found["given"] else "-", "", "")


def _told(phase: Mapping[str, Any]) -> tuple[str, str, str]:
    """Verdicts in answers' heads that came true, and those after which the engine promised more."""
    counts = phase["verdicts"]
    told = sum(sum(row.values()) for row in counts.values())
    right = sum(row.get(said, 0) for said, row in counts.items())
    more = sum(row.get(did, 0) for said, row in counts.items() for did in _BETTER.get(said, ()))
    return (f"{right}/{told} true" + (f", {more} got more" if more else "") if told else "-", "", "")


def _left(phase: Mapping[str, Any]) -> tuple[str, str, str]:
    """Requests that were not promised anything: how many, and how late their first tokens came."""
    if not phase["best_effort"]:
        return ("-", "-", "-")
    ttft = phase["best_effort_ttft_ms"]
    late = "-" if ttft["p50"] is None else f"{ttft['p50'] / 1e3:.2f} / {ttft['p99'] / 1e3:.2f}"
    return (f"{phase['best_effort']} ended" if _all_ended(phase) else f"{phase['best_effort']}", late, "-")


def _all_ended(phase: Mapping[str, Any]) -> bool:
    return bool(phase["best_effort_completed"] == phase["best_effort"])


def _cells(row: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if row is None or not row["requests"]:
        return ("-", "-", "-")
    ttft, tpot = row["ttft_ms"], row["tpot_ms"]
    return (
        f"{row['attained']}/{row['requests']} ({row['attained'] / row['requests']:.0%})",
        "-" if ttft["p50"] is None else f"{ttft['p50'] / 1e3:.2f} / {ttft['p99'] / 1e3:.2f}",
        "-" if tpot["p50"] is None else f"{tpot['p50']:.0f} / {tpot['p99']:.0f}",
    )
