"""Attained, every token in time and admitted that attain, on seeds that no constant was chosen on.

    python -m benchmarks.heldout [--requests 600] [--seeds 22 23] [--exact] [--noise 0.15] [--bias 1.1] [--json FILE]

Seeds of tuning are refused without ``--tuning``, those of tables with it (benchmarks/README.md). Rates are near the
planner's capacity on OPT-13B and an A100; another engine (``--profile``) gets the same share of its fluid bound.
``recomputed``: share of tokens computed again after a preemption.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from slos_serve.sim.bounds import fluid_bound, work_of
from slos_serve.sim.conditions import AS_SERVED, EXACT, Conditions
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
from slos_serve.sim.question import measured_part
from slos_serve.sim.seeds import FIRST_TEST_SEED, check_test, check_tuning
from slos_serve.workload.scenarios import make_workload

TUNED_ON = "opt-13b-a100"
RATES_RPS = {"chat": 2.75, "coding": 0.29, "mixed": 1.58, "summarization": 1.06, "tool": 0.042, "reasoning": 0.21}
LONG = ("tool", "reasoning")


@dataclass(frozen=True)
class Cell:
    """Means over seeds of one scenario, as shares."""

    attained: float
    strict: float
    admitted_attained: float
    recomputed: float


def rate_on(profile_name: str, scenario: str) -> float:
    """Requests/s: the share of the engine's fluid bound that ``RATES_RPS`` is of that of ``TUNED_ON``."""
    if profile_name == TUNED_ON:
        return RATES_RPS[scenario]
    bounds_rps, sample = [], make_workload(scenario, 1.0, 2000, seed=FIRST_TEST_SEED, arrivals="poisson")
    for name in (profile_name, TUNED_ON):
        profile = find_profile(name)
        bounds_rps.append(fluid_bound(work_of(sample.bound(profile.model)), profile.model, limits_of(profile)))
    return RATES_RPS[scenario] * bounds_rps[0] / bounds_rps[1]


def measure(scenario: str, seeds: Sequence[int], requests: int, profile_name: str, conditions: Conditions) -> Cell:
    """Simulate a scenario with every seed; half as many requests where answers are long."""
    profile, found, rate_rps = find_profile(profile_name), [], rate_on(profile_name, scenario)
    for seed in seeds:
        count = requests // 2 if scenario in LONG else requests
        load = make_workload(scenario, rate_rps, count, seed)
        settings = conditions.on(SimSettings(kv_bytes_per_token=kv_bytes_per_token(profile), seed=seed))
        recording = simulate(load, profile.model, limits_of(profile), settings)
        measured = measured_part(load.num_requests)
        outcome = summarize_run(recording, measured)
        found.append(
            (
                outcome.attainment,
                outcome.strict,
                outcome.admitted_attained / max(outcome.admitted, 1),
                outcome.recomputed,
            )
        )
    return Cell(*np.mean(found, axis=0).tolist())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[22, 23])
    parser.add_argument("--exact", action="store_true", help="steps take exactly what the profile says")
    parser.add_argument("--noise", type=float, help="coefficient of variation of step times")
    parser.add_argument("--bias", type=float, default=1.0)
    parser.add_argument("--profile", default=TUNED_ON)
    parser.add_argument("--tuning", action="store_true", help="the seeds are for choosing constants")
    parser.add_argument("--json", type=Path, help="keep the cells here")
    given = parser.parse_args(arguments)
    seeds = check_tuning(given.seeds) if given.tuning else check_test(given.seeds)
    conditions = replace(EXACT if given.exact else AS_SERVED, bias=given.bias)
    if given.noise is not None:
        conditions = replace(conditions, noise=given.noise)
    print(
        "| scenario | attained, % | every token, % | admitted that attain, % | recomputed, % |\n|---|---|---|---|---|"
    )
    rows, cells = [], {}
    for scenario in RATES_RPS:
        cell = measure(scenario, seeds, given.requests, given.profile, conditions)
        cells[scenario] = asdict(cell)
        rows.append((cell.attained, cell.strict, cell.admitted_attained, cell.recomputed))
        print(f"| {scenario} | " + " | ".join(f"{100.0 * value:.1f}" for value in rows[-1]) + " |", flush=True)
    print("| mean | " + " | ".join(f"{100.0 * value:.1f}" for value in np.mean(rows, axis=0)) + " |")
    if given.json is not None:
        given.json.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
