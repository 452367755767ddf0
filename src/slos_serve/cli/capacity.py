"""``slos-serve capacity``: the rate each policy carries, scenario by scenario, beside what is possible at all."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from slos_serve.cli.printed import failure, output_file, progress_bar, warn
from slos_serve.cli.sim_options import (
    Acceptance,
    Arrivals,
    Drafter,
    Exact,
    JsonFile,
    Oracle,
    ProfileName,
    Router,
    conditions_of,
    console,
    policy_names,
    policy_of,
    scenarios_of,
    write_json,
)
from slos_serve.core.errors import InvalidFieldError, SlosServeError

if TYPE_CHECKING:
    from slos_serve.sim.question import Answer, Question
    from slos_serve.sim.search import Capacity

OURS = "slos-serve"
# A simulation takes as long as its tokens: by default it has this many, within these numbers of requests.
TOKENS, FEWEST_REQUESTS, MOST_REQUESTS = 330_000, 300, 1500


def capacity(
    scenario: Annotated[list[str] | None, typer.Option(help="Scenario, or all; may be repeated.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Policy; may be repeated. Default: all.")] = None,
    profile: ProfileName = "opt-13b-a100",
    arrivals: Arrivals = "scenario",
    replicas: Annotated[int, typer.Option(min=1, help="Engines; distserve takes at least two.")] = 1,
    router: Router = "least-loaded",
    requests: Annotated[
        int | None,
        typer.Option(
            min=20, help="Requests of each simulation, times replicas. Default: 1500, fewer where answers are long."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=20, help="Seeds, each searched by itself. Default: 3, or 5 where arrivals are bursty."),
    ] = None,
    tuning: Annotated[
        bool, typer.Option("--tuning", help="Use the seeds that constants may be chosen on, not those of tables.")
    ] = False,
    attain: Annotated[float, typer.Option(min=0.01, max=0.999, help="Share of requests that must attain.")] = 0.9,
    oracle_lengths: Oracle = False,
    acceptance: Acceptance = 0.7,
    drafter: Drafter = "none",
    exact: Exact = False,
    processes: Annotated[int, typer.Option(min=1, help="Simulations at once.")] = 2,
    cache_file: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Keep every simulation here (JSON lines) and reuse what is there.", callback=output_file
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Search the highest rate per GPU at which the share of requests attains; each policy at its best parameters."""
    from slos_serve.sim.drafters import with_drafter
    from slos_serve.sim.profiles import find_profile
    from slos_serve.sim.question import Question
    from slos_serve.sim.search import search_capacity
    from slos_serve.sim.seeds import check_tuning_engine
    from slos_serve.sim.sweep import AnswerFile, run_searches
    from slos_serve.workload.scenarios import make_workload

    try:
        with_drafter(find_profile(profile), drafter)
        if tuning:
            check_tuning_engine(profile)
        names = scenarios_of(scenario or ["all"])
        names = _searchable(names, profile, leave_out="all" in (scenario or ["all"]))
        policies = [policy_of(text) for text in policy or policy_names()]
        make_workload(names[0], 1.0, 1, arrivals=arrivals)
        searches = []
        for name in names:
            count = requests or default_requests(name)
            for chosen, parameters in policies:
                engines = max(replicas, 2) if chosen == "distserve" else replicas
                base = Question(
                    scenario=name,
                    policy=chosen,
                    parameters=parameters,
                    profile=profile,
                    arrivals=arrivals,
                    rate_rps=1.0,
                    num_requests=count * engines,
                    seed=0,
                    replicas=engines,
                    router=router,
                    oracle_lengths=oracle_lengths,
                    acceptance=acceptance,
                    drafter=drafter,
                    conditions=conditions_of(exact),
                )
                own_seeds = _seeds(name, arrivals, seeds, tuning)
                searches.append((f"{name} {chosen}", search_capacity(base, own_seeds, attain, variants=not parameters)))
        began = time.perf_counter()
        counts = {"simulations": 0, "steps": 0}
        with progress_bar() as bar:
            task = bar.add_task("capacity", total=len(searches))

            def on_answer(label: str, question: Question, found: Answer) -> None:
                counts["simulations"] += 1
                counts["steps"] += found.steps
                rate = question.rate_rps / question.replicas
                bar.update(task, description=f"{label}: {100 * found.attainment:.0f} % at {rate:.2f}/s")

            def on_done(label: str, found: Capacity) -> None:
                bar.console.print(f"{label}: {found.capacity_rps_per_gpu:.3f} requests/s per GPU", highlight=False)
                bar.advance(task)

            results = run_searches(searches, AnswerFile(cache_file), processes, on_answer, on_done)
    except SlosServeError as fault:
        raise failure(fault) from fault
    wall_s = time.perf_counter() - began
    for table in tables(results):
        console.print(table)
    for line in geometric_means(results):
        console.print(line, highlight=False)
    for row in results:
        _warn_of_a_burst(row, attain, drafter)
    console.print(f"{counts['simulations']} simulations, {counts['steps']:,} steps, {wall_s:.0f} s", highlight=False)
    write_json(json_file, [row.as_dict() for row in results])


def _searchable(names: list[str], profile: str, *, leave_out: bool) -> list[str]:
    """The scenarios of which an engine can carry some rate; the others are left out, and named, or refused."""
    from slos_serve.sim.rate_bounds import check_can_be_kept

    kept = []
    for name in names:
        try:
            check_can_be_kept(name, profile)
        except InvalidFieldError as fault:
            if not leave_out:
                raise
            Console(stderr=True).print(f"{name} is left out: {fault}", highlight=False)
            continue
        kept.append(name)
    return kept


def _warn_of_a_burst(row: Capacity, attain: float, drafter: str) -> None:
    """A rate that no engine can keep up was found with too few requests: they end before the deadlines."""
    from slos_serve.sim.profiles import find_profile
    from slos_serve.sim.question import Question
    from slos_serve.sim.rate_bounds import enough_for, most_rps

    base = Question(row.scenario, row.policy, {}, row.profile, row.arrivals, 1.0, 1, 0, drafter=drafter)
    most = most_rps(base, attain) / find_profile(row.profile).tensor_parallel
    if row.capacity_rps_per_gpu > most:
        enough = enough_for(base, attain)
        said = f"{row.scenario} {row.policy}: an engine cannot keep up {row.capacity_rps_per_gpu:.2f} requests/s"
        more = "more" if enough is None else f"at least {enough}"
        warn(f"{said} (at most {most:.2f}). The run ends before its deadlines: ask for {more} requests (--requests)")


def _seeds(scenario: str, arrivals: str, count: int | None, tuning: bool) -> list[int]:
    from slos_serve.sim.seeds import default_count, table_seeds, tuning_seeds
    from slos_serve.workload.scenarios import scenario_named

    process = scenario_named(scenario).arrivals if arrivals == "scenario" else arrivals
    chosen = count or default_count(process)
    return tuning_seeds(chosen) if tuning else table_seeds(chosen)


def default_requests(scenario: str) -> int:
    """Requests of a simulation whose answers have about :data:`TOKENS` tokens together."""
    from slos_serve.workload.scenarios import make_workload

    sample = 500
    mean_tokens = make_workload(scenario, 1.0, sample).calls["output_tokens"].sum() / sample
    return int(min(max(TOKENS / mean_tokens, FEWEST_REQUESTS), MOST_REQUESTS))


def tables(results: list[Capacity]) -> list[Table]:
    """Capacity of each scenario and policy, a line each, and what no policy can carry of each scenario."""
    capacities = Table(title="Highest requests/s per GPU (95 % interval)", title_justify="left")
    for column in ("scenario", "policy"):
        capacities.add_column(column, overflow="fold")
    for column in ("by the mean", "every token in time", "attained by prompt quartile, short to long (%)"):
        capacities.add_column(column, justify="right")
    bounds = Table(title="What no policy can carry, requests/s per GPU", title_justify="left")
    bounds.add_column("scenario", overflow="fold")
    for column in ("fluid bound / 0.9", "with speculation", "costliest tenth dropped"):
        bounds.add_column(column, justify="right")
    bound_of: dict[str, tuple[str, str, str]] = {}
    for row in results:
        capacities.add_row(
            row.scenario if row.scenario not in bound_of else "",
            row.policy,
            _with_interval(row.capacity_rps_per_gpu, row.ci),
            _with_interval(row.strict_rps_per_gpu, row.strict_ci),
            " ".join(f"{100 * share:.0f}" for share in row.by_prompt_quartile),
        )
        bound_of[row.scenario] = (
            f"{row.fluid_bound_rps_per_gpu / 0.9:.2f}",
            f"{row.fluid_bound_speculative_rps_per_gpu / 0.9:.2f}",
            f"{row.fluid_bound_dropping_rps_per_gpu:.2f}",
        )
    for scenario, those in bound_of.items():
        bounds.add_row(scenario, *those)
    return [capacities, bounds]


def _with_interval(rps: float, interval: tuple[float, float]) -> str:
    return f"{rps:.2f} ({interval[0]:.2f}-{interval[1]:.2f})"


def geometric_means(results: list[Capacity]) -> list[str]:
    """:func:`geometric_mean_ratios` of searches that have just ended."""
    return geometric_mean_ratios({(row.scenario, row.policy): row.capacity_rps_per_gpu for row in results})


def geometric_mean_ratios(capacities: Mapping[tuple[str, str], float]) -> list[str]:
    """Our capacity over each baseline's, and over the best baseline of each scenario: geometric means.

    Args:
        capacities: (scenario, policy) -> requests/s; a baseline that carries nothing at all is left out of its mean.
    """
    by_scenario: dict[str, dict[str, float]] = defaultdict(dict)
    for (scenario, policy), value in capacities.items():
        by_scenario[scenario][policy] = value
    ratios: dict[str, list[float]] = defaultdict(list)
    for rows in by_scenario.values():
        ours = rows.get(OURS)
        others = {name: value for name, value in rows.items() if name != OURS and value > 0.0}
        if ours is None or not others:
            continue
        for name, value in {**others, "the best baseline": max(others.values())}.items():
            ratios[name].append(ours / value)
    return [
        f"{OURS} over {name}: {_geometric(values):.2f}x (geometric mean of {len(values)} scenarios)"
        for name, values in ratios.items()
    ]


def _geometric(values: list[float]) -> float:
    return math.exp(sum(math.log(max(value, 1e-9)) for value in values) / len(values))
