"""Every engine, scenario and arrival process: SLOs-Serve over the best rival of each cell.

    python -m benchmarks.matrix [--engine opt-13b-a100] [--scenario chat] [--arrivals poisson] [--policy edf]
        [--drafter opt-125m] [--quick]

Capacity at 90 % attained, by the mean of each stage and with every token in time. In each cell every rival of the
registry is first compared on a tuning seed, with all of its parameters; the best three of them and SLOs-Serve are then
searched on the seeds of tables. A parameter set or rival that one simulation shows to be worse than those found so far
is searched no further; on the seeds of tables one a seed and metric. Every simulation is kept in ``answers.jsonl``
beside the result, so that a run goes on where it was interrupted, and a change of our planner leaves the rivals'
answers as they are. Rows of finished cells are in ``matrix.json`` at any time; cells below 1.0 are printed first.
Where nobody carries a twentieth of the bound, shares at half of it are compared instead (``benchmarks/flat_cells.py``).
``--quick`` takes 100 requests and two seeds: to see that it runs, not to publish.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ideal
from benchmarks._sim_commands import RESULTS
from benchmarks.flat_cells import Shares, attained_shares, is_flat, row_of_shares, table_of_shares
from slos_serve.bench.charts import Chart, Series, png_bytes
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.conditions import AS_SERVED, EXACT
from slos_serve.sim.drafters import DRAFTERS, NO_DRAFTER
from slos_serve.sim.interval import ratio_interval
from slos_serve.sim.profiles import find_profile
from slos_serve.sim.question import Answer, Question
from slos_serve.sim.rate_bounds import bounds_of, enough_requests
from slos_serve.sim.search import Capacity, Screened, is_behind, screen, search_seeds
from slos_serve.sim.seeds import default_count, table_seeds
from slos_serve.sim.sweep import AnswerFile, run_searches
from slos_serve.workload.scenarios import DEFAULT_ACCEPTANCE, SCENARIOS, scenario_named

ENGINES = ("opt-13b-a100", "llama-2-7b-h100", "opt-66b-a100-tp4", "llama-3.1-8b-h100")
SEVEN = ("chat", "coding", "mixed", "summarization", "tool", "reasoning", "long")
ARRIVALS = ("poisson", "gamma:3", "scenario")
OURS = "slos-serve"
FINALISTS = 3
LIKELY = ("qoserve", "edf", "scorpio")  # compared first: most others need one simulation then
# Requests of a simulation: at least these, fewer where answers are long; and so many that they take ``USUAL_SPAN_S`` to
# arrive at the fluid bound, or several times as long as an answer takes, within ``MOST_REQUESTS``.
REQUESTS, SPAN_S = {"tool": 200, "reasoning": 200}, {"reasoning": 300.0, "agents": 300.0}
USUAL_REQUESTS, MOST_REQUESTS, USUAL_SPAN_S = 400, 4000, 120.0
# With bursty arrivals an engine carries a fraction of the bound, so fewer requests take as long to arrive.
BURSTY, BURSTY_SHARE = "gamma", 0.4
QUICK_REQUESTS, QUICK_SEEDS = 100, 2
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One engine under one scenario and arrival process."""

    engine: str
    scenario: str
    arrivals: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.engine} {self.scenario} {self.arrivals}"

    @property
    def num_seeds(self) -> int:
        """Five where arrivals are bursty."""
        own = scenario_named(self.scenario).arrivals if self.arrivals == "scenario" else self.arrivals
        return default_count(own)

    @property
    def num_requests(self) -> int:
        """Of a simulation with one engine."""
        asked = Question(self.scenario, OURS, {}, self.engine, self.arrivals, 1.0, 1, 0)
        share = BURSTY_SHARE if self.arrivals.startswith(BURSTY) else 1.0
        enough = enough_requests(asked, share * SPAN_S.get(self.scenario, USUAL_SPAN_S))
        return max(REQUESTS.get(self.scenario, USUAL_REQUESTS), min(enough, MOST_REQUESTS))


Found = tuple[Capacity, list[Capacity], dict[str, dict[str, Any]]] | Shares


def search_cell(
    cell: Cell,
    policies: Sequence[str],
    requests: int,
    seeds: Sequence[int],
    exact: bool,
    drafts: tuple[str, float] = (NO_DRAFTER, DEFAULT_ACCEPTANCE),
) -> Generator[list[Question], list[Answer], Found]:
    """Ours and the best rivals on the seeds of tables, and what every rival carried on a tuning seed.

    Args:
        drafts: the drafter that all of them have, and the probability that a draft token is right.
    """

    def base(policy: str) -> Question:
        replicas = 2 if POLICIES[policy].make_decode is not None else 1
        return Question(
            cell.scenario,
            policy,
            dict(POLICIES[policy].variants[0]),
            cell.engine,
            cell.arrivals,
            1.0,
            requests * replicas,
            0,
            replicas=replicas,
            drafter=drafts[0],
            acceptance=drafts[1],
            conditions=EXACT if exact else AS_SERVED,
        )

    bases = [base(policy) for policy in (OURS, *policies)]
    bound_rps, _, _ = bounds_of(bases[0])
    if (yield from is_flat(bases, bound_rps)):
        return (yield from attained_shares(bases, bound_rps, seeds, FINALISTS))
    screened: list[Screened] = []
    for policy in policies:
        # Only the best few matter: one that does not reach the last of them is looked at no further.
        found = sorted((_rate_of(one) for one in screened if not one.at_most), reverse=True)
        beat = found[FINALISTS - 1] if len(found) >= FINALISTS else 0.0
        asked = base(policy)
        screened.append((yield from screen(asked, beat_rps=beat * asked.replicas)))
    each = {one.best.policy: {"rps": _rate_of(one), "at_most": one.at_most} for one in screened}
    screened.sort(key=lambda one: (one.at_most, -_rate_of(one)))
    ours = yield from search_seeds((yield from screen(base(OURS))), seeds)
    rivals: list[Capacity] = []
    for one in screened[:FINALISTS]:
        if (yield from is_behind(one, rivals, seeds)):
            each[one.best.policy]["behind"] = True
        else:
            rivals.append((yield from search_seeds(one, seeds)))
    return ours, rivals, each


def _rate_of(screened: Screened) -> float:
    """Requests/s of one replica."""
    return screened.rate_rps / screened.best.replicas


def row_of(cell: Cell, found: Found, drafting: bool = False) -> Row:
    """A cell's result: capacities of all, and ours over the best rival by each metric.

    With drafts the bound is of all requests at full speed, and what an ideal engine would promise is not known.
    """
    if isinstance(found, Shares):
        return {"engine": cell.engine, "scenario": cell.scenario, "arrivals": cell.arrivals, **row_of_shares(found)}
    ours, rivals, each = found
    row: Row = {"engine": cell.engine, "scenario": cell.scenario, "arrivals": cell.arrivals, "screened": each}
    for metric, seeds_of in (("mean", "by_seed"), ("strict", "strict_by_seed")):
        best = max(rivals, key=lambda one: sum(getattr(one, seeds_of)))
        over, low, high = ratio_interval(getattr(ours, seeds_of), getattr(best, seeds_of))
        row[metric] = {"rival": best.policy, "over": over, "low": low, "high": high}
    bound = ours.fluid_bound_speculative_rps_per_gpu if drafting else ours.fluid_bound_dropping_rps_per_gpu
    row["of_possible"] = ours.capacity_rps_per_gpu / bound
    row["of_ideal"] = None
    if cell.scenario in ideal.SCENARIOS and not drafting:
        row["of_ideal"] = ours.capacity_rps_per_gpu / ideal_capacity(cell, ours)
    row["capacities"] = [one.as_dict() for one in (ours, *rivals)]
    return row


def ideal_capacity(cell: Cell, ours: Capacity) -> float:
    """Requests/s per GPU at which an ideal engine promises 90 % of the same requests."""
    case = ideal.Case(
        cell.scenario,
        selective=True,
        replicas=1,
        requests=ours.num_requests,
        seeds=len(ours.seeds),
        arrivals=cell.arrivals,
        drafter="none",
        acceptance=0.7,
        margin=0.0,
        profile=cell.engine,
    )
    return float(ideal.search(case)["capacity_rps_per_gpu"]) / find_profile(cell.engine).tensor_parallel


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios."""
    return math.exp(sum(math.log(max(value, 1e-9)) for value in values) / len(values)) if values else math.nan


def table(rows: Sequence[Row]) -> str:
    """Markdown, cells in which ours is behind by either metric first."""
    flat, rows = [row for row in rows if row.get("flat")], [row for row in rows if not row.get("flat")]
    columns = ["engine", "scenario", "arrivals", "by mean", "rival", "every token", "rival"]
    columns += ["ours, req/s per GPU", "of the bound", "of the ideal"]
    head = "| " + " | ".join(columns) + " |"
    lines = [head, "|" + "---|" * 10]
    behind = sorted(rows, key=lambda row: min(row["mean"]["over"], row["strict"]["over"], 1.0))
    for row in behind:
        cells = [row["engine"], row["scenario"], row["arrivals"]]
        for metric in ("mean", "strict"):
            one = row[metric]
            cells += [f"{one['over']:.2f} ({one['low']:.2f}-{one['high']:.2f})", one["rival"]]
        ours = row["capacities"][0]
        cells += [f"{ours['capacity_rps_per_gpu']:.3g}", f"{row['of_possible']:.2f}"]
        cells.append("-" if row["of_ideal"] is None else f"{row['of_ideal']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    means = [geometric_mean([row[metric]["over"] for row in rows]) for metric in ("mean", "strict")]
    ideal_over = [row["mean"]["over"] / row["of_ideal"] for row in rows if row["of_ideal"]]
    below = sum(min(row["mean"]["over"], row["strict"]["over"]) < 1.0 for row in rows)
    lines.append(
        f"\n{len(rows)} cells, {below} of them below 1.0. "
        f"Geometric mean: {means[0]:.2f} by mean, {means[1]:.2f} with every token in time."
    )
    if ideal_over:
        lines.append(
            f"In the {len(ideal_over)} cells of which it is known, an ideal engine carries "
            f"{geometric_mean(ideal_over):.2f} times as much as the best rival by mean."
        )
    if flat:
        lines.append("\n" + table_of_shares(flat))
    return "\n".join(lines)


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Ours over the best rival of each cell, a chart an engine."""
    made = []
    rows = [row for row in rows if not row.get("flat")]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        names = [f"{row['scenario']}\n{row['arrivals']}" for row in own]
        series = [
            Series(
                label,
                names,
                [row[metric]["over"] for row in own],
                [row[metric]["low"] for row in own],
                [row[metric]["high"] for row in own],
            )
            for metric, label in (("mean", "by the mean"), ("strict", "every token in time"))
        ]
        title = f"{engine}: capacity over the best rival's"
        made.append(Chart(f"matrix-{engine}", title, "", "times", series, kind="bars", marks=(("1", 1.0),)))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Search every cell, keep what is found, and print the table."""
    given = _options(arguments)
    cells = [
        Cell(engine, name, arrivals)
        for engine in given.engine
        for name in given.scenario
        for arrivals in given.arrivals
    ]
    searches, drafts = [], (given.drafter, given.acceptance)
    for cell in cells:
        requests = given.requests or (QUICK_REQUESTS if given.quick else cell.num_requests)
        seeds = table_seeds(given.seeds or (QUICK_SEEDS if given.quick else cell.num_seeds))
        searches.append((cell.name, search_cell(cell, given.policy, requests, seeds, given.exact, drafts)))
    file = given.output / "matrix.json"
    given.output.mkdir(parents=True, exist_ok=True)
    by_name = {cell.name: cell for cell in cells}
    rows: dict[str, Row] = {}
    began, simulations = time.monotonic(), 0

    def on_answer(_name: str, _question: Question, _found: Answer) -> None:
        nonlocal simulations
        simulations += 1
        if simulations % 50 == 0:
            spent = (time.monotonic() - began) / 60.0
            print(f"{spent:.0f} min, {len(rows)} of {len(cells)} cells, {simulations} simulations", file=sys.stderr)

    def on_done(name: str, found: Found) -> None:
        rows[name] = row_of(by_name[name], found, given.drafter != NO_DRAFTER)
        file.write_text(json.dumps([rows[one] for one in by_name if one in rows], indent=1) + "\n", encoding="utf-8")
        one = rows[name]
        print(f"{name}: {one['mean']['over']:.2f} over {one['mean']['rival']}, every token {one['strict']['over']:.2f}",
              file=sys.stderr, flush=True)  # fmt: skip

    run_searches(searches, AnswerFile(given.output / "answers.jsonl"), given.processes, on_answer, on_done)
    found = [rows[cell.name] for cell in cells]
    print(table(found))
    for chart in charts(found):
        (given.output / f"{chart.key}.png").write_bytes(png_bytes(chart))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", help=f"profile; default: {', '.join(ENGINES)}")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="default: the seven")
    parser.add_argument("--arrivals", action="append", help=f"default: {', '.join(ARRIVALS)}")
    parser.add_argument(
        "--policy",
        action="append",
        choices=list(POLICIES),
        metavar="POLICY",
        help="rival; default: all of the registry that know no true lengths",
    )
    parser.add_argument("--requests", type=int, default=0, help="of each simulation")
    parser.add_argument("--seeds", type=int, default=0, help="default: 3, or 5 where arrivals are bursty")
    parser.add_argument("--quick", action="store_true", help="100 requests, 2 seeds")
    parser.add_argument("--drafter", default=NO_DRAFTER, choices=DRAFTERS, help="what everybody drafts with")
    parser.add_argument("--acceptance", type=float, default=DEFAULT_ACCEPTANCE, help="share of drafts that are right")
    parser.add_argument("--exact", action="store_true", help="steps take exactly what the profile says")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    given.engine = given.engine or list(ENGINES)
    given.scenario = given.scenario or list(SEVEN)
    given.arrivals = given.arrivals or list(ARRIVALS)
    honest = [name for name, entry in POLICIES.items() if name != OURS and not entry.true_lengths]
    given.policy = sorted(given.policy or honest, key=lambda name: name not in LIKELY)
    return given


if __name__ == "__main__":
    sys.exit(main())
