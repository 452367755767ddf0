"""Prefill and decode on different GPUs, or together: attained share on the same number of GPUs, by scenario and load.

    python -m benchmarks.disaggregation [--scenario chat] [--load 0.6] [--link 50] [--replicas 4] [--seeds 3]

Loads are multiples of the fluid bound (docs/simulator.md) of all replicas together. ``shifting`` is a mix that changes:
prompts of summarization for one minute, then reasoning for five. Every column gets the same requests:

- together: every replica serves whole requests; the router asks the mirrors of their planners;
- fixed: prefill and decode apart, pairs chosen by the router, the best of all splits;
- moving: the same, beginning with that split; replicas change role with the mix;
- distserve: DistServe's policies, first come, first served, least loaded, at its best split;
- vllm apart, vllm: stock vLLM's order, apart at its best split and together, least loaded.

A split is the best of its column on a tuning seed at the highest load. KV moves over a link of ``--link`` GB/s in and
out of each replica. Under ``distserve`` clients get the first token when the prompt is computed; elsewhere the decode
replica gives it, as vLLM has it. Each cell: mean share attained and its 95 % interval over the seeds; after the slash
the share with every token in time; then the split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks._sim_commands import RESULTS
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.bounds import fluid_bound
from slos_serve.sim.conditions import AS_SERVED
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.interval import seed_interval
from slos_serve.sim.outcome import Outcome, summarize_run
from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
from slos_serve.sim.question import measured_part
from slos_serve.sim.rate_bounds import bound_work
from slos_serve.sim.seeds import table_seeds, tuning_seeds
from slos_serve.workload.calls import Workload
from slos_serve.workload.scenarios import make_workload

# Prompts per output token fall from the first to the last.
SCENARIOS = ("summarization", "coding", "mixed", "chat", "reasoning", "shifting")
LOADS = (0.5, 0.7)
SPAN_S, LONG_SPAN_S = 60.0, 300.0
PARTS = {"shifting": ("summarization", "reasoning")}
COLUMNS = {
    "together": SimSettings(router="slo"),
    "fixed": SimSettings(router="slo", prefill_replicas=1),
    "moving": SimSettings(router="slo", prefill_replicas=1, moving_roles=True),
    "distserve": SimSettings(policy="distserve", prefill_replicas=1),
    "vllm apart": SimSettings(policy="vllm", prefill_replicas=1),
    "vllm": SimSettings(policy="vllm"),
}


@dataclass(frozen=True)
class Case:
    """One simulation.

    Attributes:
        load: multiple of the fluid bound.
        link_gb_s: of each replica, in and out.
    """

    scenario: str
    column: str
    load: float
    prefill: int
    seed: int
    replicas: int
    profile: str
    link_gb_s: float


@dataclass(frozen=True)
class Found:
    """What one simulation came to.

    Attributes:
        attained, strict: share of the requests, by the mean pace and with every token in time.
        kept: share of those that were promised; ``None`` where nobody was.
    """

    attained: float
    strict: float
    kept: float | None
    tokens_per_s: float


def rate_of(scenario: str, profile: str, replicas: int) -> float:
    """Requests a second at the fluid bound of all replicas."""
    measured = find_profile(profile)
    return replicas * fluid_bound(bound_work(scenario, profile), measured.model, limits_of(measured))


def workload_of(case: Case) -> Workload:
    """Its requests: one scenario, or one after the other."""
    parts = []
    for name in PARTS.get(case.scenario, (case.scenario,)):
        rate_rps = case.load * rate_of(name, case.profile, case.replicas)
        span_s = LONG_SPAN_S if name == "reasoning" else SPAN_S
        parts.append(make_workload(name, rate_rps, max(round(span_s * rate_rps), 40), case.seed, "poisson"))
    joined = parts[0]
    for later in parts[1:]:
        calls = later.calls.copy()
        calls["arrival_s"] += joined.calls["arrival_s"].max()
        calls["session"] += joined.num_requests
        calls["class_index"] += len(joined.classes)
        joined = Workload(case.scenario, joined.classes + later.classes, np.concatenate((joined.calls, calls)))
    return joined


def run(case: Case) -> Found:
    """Simulate a case."""
    measured, column = find_profile(case.profile), COLUMNS[case.column]
    settings = replace(
        column,
        parameters=dict(POLICIES[column.policy].variants[0]),
        replicas=case.replicas,
        prefill_replicas=case.prefill,
        kv_bytes_per_token=kv_bytes_per_token(measured),
        transfer_bytes_per_s=1e9 * case.link_gb_s,
        seed=case.seed,
    )
    workload = workload_of(case)
    recording = simulate(workload, measured.model, limits_of(measured), AS_SERVED.on(settings))
    outcome: Outcome = summarize_run(recording, measured_part(workload.num_requests))
    kept = outcome.admitted_attained / outcome.admitted if outcome.admitted else None
    return Found(outcome.attainment, outcome.strict, kept, outcome.output_tokens_per_s)


def split_cases(case: Case) -> list[Case]:
    """A case at every split, on a tuning seed."""
    (seed,) = tuning_seeds(1)
    return [replace(case, prefill=count, seed=seed) for count in range(1, case.replicas)]


def best_splits(cases: Sequence[Case], pool: ProcessPoolExecutor) -> dict[tuple[str, str], int]:
    """(scenario, column) -> prefill replicas of the best split; that of ``fixed`` is where ``moving`` begins."""
    tried = [one for case in cases for one in split_cases(case)]
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for case, found in zip(tried, pool.map(run, tried), strict=True):
        key = (case.scenario, case.column)
        best[key] = max(best.get(key, (-1.0, 0)), (found.attained, case.prefill))
    return {key: split for key, (_, split) in best.items()}


def table(given: argparse.Namespace, pool: ProcessPoolExecutor) -> list[dict[str, object]]:
    """Print the rows as they come; every simulation behind them."""
    highest = given.load[-1]
    own = [name for name, column in COLUMNS.items() if column.prefill_replicas and not column.moving_roles]
    rest = (given.replicas, given.profile, given.link)
    splits = best_splits([Case(name, one, highest, 1, 0, *rest) for name in given.scenario for one in own], pool)
    print("| scenario | load | requests/s | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (3 + len(COLUMNS)), flush=True)
    rows = []
    for name in given.scenario:
        for load in given.load:
            cells, rate = [], "" if name in PARTS else f"{load * rate_of(name, given.profile, given.replicas):.1f}"
            for column in COLUMNS:
                split = splits.get((name, "fixed" if column == "moving" else column), 0)
                cases = [Case(name, column, load, split, seed, *rest) for seed in table_seeds(given.seeds)]
                found = list(pool.map(run, cases))
                low, high = seed_interval([one.attained for one in found])
                mean, strict = (
                    float(np.mean([getattr(one, name) for one in found])) for name in ("attained", "strict")
                )
                where = f" ({split}+{given.replicas - split})" if split else ""
                cells.append(
                    f"{100 * mean:.1f} [{100 * low:.0f}, {100 * min(high, 1.0):.0f}] / {100 * strict:.0f}{where}"
                )
                rows += [{**asdict(case), **asdict(one)} for case, one in zip(cases, found, strict=True)]
            print(f"| {name} | {load:g} | {rate} | " + " | ".join(cells) + " |", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table as rows come, and keep every simulation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="default: all")
    parser.add_argument("--load", type=float, action="append", help=f"times the fluid bound; default: {LOADS}")
    parser.add_argument("--link", type=float, default=50.0, help="GB/s of each replica's link, in and out")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--profile", default="opt-13b-a100")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    given.scenario, given.load = given.scenario or list(SCENARIOS), sorted(given.load or LOADS)
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        rows = table(given, pool)
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / f"disaggregation-{given.profile}-{given.link:g}.json"
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
