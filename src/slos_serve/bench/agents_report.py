"""The story of agents as a result: one JSON, one table, and the claims it either bears out or does not.

What is counted is what a user waits for: a chat, a whole JSON answer, a whole task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from slos_serve.bench.agents_plan import ANSWER, CHAT, TASK
from slos_serve.bench.demo_plan import DemoPlan
from slos_serve.bench.demo_report import OURS, PHASES, SIDE_TITLES, STOCK
from slos_serve.bench.report import error_counts, throughput_json
from slos_serve.bench.requests import LoadResult
from slos_serve.bench.scoring import score_response, score_tasks
from slos_serve.metrics.summary import wilson_interval
from slos_serve.perf.batch_time import BatchTimeModel

KINDS = (CHAT, ANSWER, TASK)
Loads = Mapping[str, Mapping[str, LoadResult]]
WANTED_RATIO, WANTED_CALM, WITHIN = 1.3, 0.95, 0.1


@dataclass(frozen=True, slots=True)
class Unit:
    """What a user waits for; ``spent_s`` from sending it to the end of its last answer."""

    kind: str
    kept: bool
    spent_s: float


def units_of(load: LoadResult, plan: DemoPlan, model: BatchTimeModel) -> dict[str, Unit]:
    """Chats and answers by request id, tasks by session."""
    found = {
        session: Unit(TASK, score.kept, score.spent_s)
        for session, score in score_tasks(load.responses, plan.classes).items()
    }
    for response in load.responses:
        kind = response.request.slo_class
        if kind in (CHAT, ANSWER):
            scored = score_response(response, plan.classes, model)
            ended_s = response.chunk_times_s[-1] if response.chunk_times_s else response.ended_s
            found[response.request.request_id] = Unit(kind, scored.attained, ended_s - response.sent_s)
    return found


def agents_json(loads: Loads, plan: DemoPlan, model: BatchTimeModel, setup: Mapping[str, Any]) -> dict[str, Any]:
    """The whole result; ``ratio`` is tasks and answers kept in the burst, ours over stock (at least one)."""
    units: dict[str, dict[str, dict[str, Unit]]] = {
        side: {phase: units_of(load, plan, model) for phase, load in parts.items()} for side, parts in loads.items()
    }
    result: dict[str, Any] = {
        side: {phase: _phase_json(units[side][phase], loads[side][phase]) for phase in PHASES} for side in loads
    }
    kept = {side: sum(result[side]["burst"]["kept"][kind] for kind in (ANSWER, TASK)) for side in loads}
    calm = {side: units[side]["calm"] for side in loads}
    pairs = [(calm[OURS][key].spent_s, unit.spent_s) for key, unit in calm[STOCK].items() if key in calm[OURS]]
    times = float(np.median([ours_s / stock_s for ours_s, stock_s in pairs if stock_s > 0.0])) if pairs else None
    return {**result, "ratio": kept[OURS] / max(kept[STOCK], 1), "calm_time_ratio": times, "setup": dict(setup)}


def _phase_json(units: Mapping[str, Unit], load: LoadResult) -> dict[str, Any]:
    several = {kind: [unit for unit in units.values() if unit.kind == kind] for kind in KINDS}
    return {
        "count": {kind: len(found) for kind, found in several.items()},
        "kept": {kind: sum(unit.kept for unit in found) for kind, found in several.items()},
        "spent_s": {kind: _quantiles([unit.spent_s for unit in found]) for kind, found in several.items()},
        "throughput": throughput_json(load),
        "error_messages": error_counts(load.responses),
    }


def _quantiles(seconds: Sequence[float]) -> list[float] | None:
    return [float(value) for value in np.quantile(seconds, [0.5, 0.9])] if seconds else None


def agents_table(result: Mapping[str, Any]) -> Table:
    """Both sides and phases, a row a kind."""
    table = Table(title="What users wait for, in time", title_justify="left")
    table.add_column("phase")
    table.add_column("kind")
    for side in (STOCK, OURS):
        table.add_column(f"{SIDE_TITLES[side]}\nin time", justify="right")
        table.add_column("\nseconds p50/p90", justify="right")
    for phase in PHASES:
        for kind in KINDS:
            cells = [cell for side in (STOCK, OURS) for cell in _cells(result[side][phase], kind)]
            table.add_row(phase, kind, *cells, end_section=kind == KINDS[-1])
    return table


def _cells(phase: Mapping[str, Any], kind: str) -> tuple[str, str]:
    count, kept, spent_s = phase["count"][kind], phase["kept"][kind], phase["spent_s"][kind]
    if not count:
        return "-", "-"
    return f"{kept}/{count} ({kept / count:.0%})", f"{spent_s[0]:.1f} / {spent_s[1]:.1f}"


def agents_claims(result: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What the story is there to show, each with whether this run bears it out."""
    ratio = result["ratio"]
    kept, counts, said = {}, {}, {}
    for side in (STOCK, OURS):
        burst = result[side]["burst"]
        kept[side] = sum(burst["kept"][kind] for kind in (ANSWER, TASK))
        counts[side] = sum(burst["count"][kind] for kind in (ANSWER, TASK))
        low, high = wilson_interval(kept[side], counts[side])
        said[side] = f"{kept[side]} of {counts[side]}, 95 % interval {low:.0%} to {high:.0%}"
    burst_text = f"burst: {ratio:.2f} times as many tasks and answers in time as on stock vLLM ({said[OURS]}; "
    burst_text += f"stock {said[STOCK]}; wanted: 1.3 times)"
    shares = {side: _share(result[side]["calm"]) for side in (STOCK, OURS)}
    calm_text = f"calm: {shares[STOCK]:.1%} in time on stock vLLM, {shares[OURS]:.1%} on ours (wanted: 95 % on both)"
    times = result["calm_time_ratio"]
    took = float("nan") if times is None else times
    time_text = f"calm: each takes {took:.2f} times as long as on stock vLLM (median; wanted: within 10 %)"
    chats = {side: result[side]["burst"]["kept"][CHAT] for side in (STOCK, OURS)}
    chat_text = f"burst: {chats[OURS]} chats in time, on stock vLLM {chats[STOCK]} (wanted: no fewer)"
    return [
        (burst_text, ratio >= WANTED_RATIO),
        (chat_text, chats[OURS] >= chats[STOCK]),
        (calm_text, min(shares.values()) >= WANTED_CALM),
        (time_text, times is not None and times <= 1.0 + WITHIN),
    ]


def _share(phase: Mapping[str, Any]) -> float:
    count = sum(phase["count"].values())
    return sum(phase["kept"].values()) / count if count else 1.0
