"""What weaker promises give in a burst, and what they cost those who would have had their first promise.

    python -m benchmarks.second_best [--requests 500] [--seeds 22 23]

Bursts of four times the rate near capacity, as served, without and with ``otherwise: [{ttft_ms: 8000, tpot_ms: 150},
{e2e_ms: 120000}]`` in every class. Prints shares of all requests, and of the promises made those kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.heldout import rate_on
from slos_serve.core.slo import SLO
from slos_serve.sim.conditions import AS_SERVED
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
from slos_serve.sim.seeds import check_test
from slos_serve.workload.scenarios import make_workload

ENGINES = ("opt-13b-a100", "llama-2-7b-h100", "opt-66b-a100-tp4", "llama-3.1-8b-h100")
CELLS = tuple((engine, scenario) for engine in ENGINES for scenario in ("chat", "mixed"))
WEAKER = (SLO(ttft_ms=8000.0, tpot_ms=150.0), SLO(e2e_ms=120_000.0))


def shares(engine: str, scenario: str, seeds: Sequence[int], requests: int, weaker: tuple[SLO, ...]) -> list[float]:
    """Means over seeds: first promise made, first promise kept, some promise made; of the promises made those kept."""
    profile, found = find_profile(engine), []
    for seed in seeds:
        load = make_workload(scenario, rate_on(engine, scenario), requests, seed, "burst:4")
        load = replace(load, classes=tuple(replace(one, otherwise=weaker) for one in load.classes))
        settings = AS_SERVED.on(SimSettings(kv_bytes_per_token=kv_bytes_per_token(profile), seed=seed))
        outcome = summarize_run(simulate(load, profile.model, limits_of(profile), settings))
        made = outcome.admitted + outcome.second_best
        kept = (outcome.admitted_attained + outcome.second_best_attained) / max(made, 1)
        found.append([*(count / requests for count in (outcome.admitted, outcome.admitted_attained, made)), kept])
    return [float(share) for share in np.mean(found, axis=0)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[22, 23])
    given = parser.parse_args(arguments)
    seeds = check_test(given.seeds)
    print("| engine | scenario | weaker promises | first made | first kept | some made | kept of those made |")
    print("|---|---|---|---|---|---|---|")
    for engine, scenario in CELLS:
        for weaker in ((), WEAKER):
            cells = [f"{100.0 * share:.1f} %" for share in shares(engine, scenario, seeds, given.requests, weaker)]
            print(f"| {engine} | {scenario} | {len(weaker)} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
