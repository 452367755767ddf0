"""Complete answers with deadlines beside a chat: attained and goodput of every policy, and ours with true lengths.

    python -m benchmarks.answers [--requests 500] [--seeds 22 23]

Scenario ``answers`` as served, at loads from easy to hopeless. Rivals run with their tuned parameters
(``policies/registry.py``). Goodput counts the tokens of requests that attained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from slos_serve.sim.conditions import AS_SERVED
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
from slos_serve.sim.question import measured_part
from slos_serve.sim.seeds import check_test
from slos_serve.workload.scenarios import make_workload

LOADS = {"opt-13b-a100": (1.5, 2.25, 3.5), "llama-2-7b-h100": (9.0, 14.0, 20.0)}
OURS = "slos-serve"
RIVALS = ("vllm", "sarathi", "edf", "qoserve", "jitserve")


def run(engine: str, policy: str, rate_rps: float, seeds: Sequence[int], requests: int, oracle: bool) -> list[float]:
    """Means over seeds: attained, goodput in tokens/s, share of tokens computed again.

    Args:
        oracle: whether the policy is told the true lengths.
    """
    profile, found = find_profile(engine), []
    for seed in seeds:
        load = make_workload("answers", rate_rps, requests, seed)
        settings = AS_SERVED.on(
            SimSettings(policy=policy, oracle_lengths=oracle, kv_bytes_per_token=kv_bytes_per_token(profile), seed=seed)
        )
        recording = simulate(load, profile.model, limits_of(profile), settings)
        outcome = summarize_run(recording, measured_part(load.num_requests))
        found.append([outcome.attainment, outcome.goodput_tokens_per_s, outcome.recomputed])
    return [float(value) for value in np.mean(found, axis=0)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[22, 23])
    parser.add_argument("--engines", nargs="+", choices=sorted(LOADS), default=list(LOADS))
    given = parser.parse_args(arguments)
    seeds = check_test(given.seeds)
    print("| engine | requests/s | policy | attained | goodput tokens/s | recomputed |")
    print("|---|---|---|---|---|---|")
    for engine in given.engines:
        for rate_rps in LOADS[engine]:
            for policy, oracle in (*((name, False) for name in (*RIVALS, OURS)), (OURS, True)):
                attained, goodput, recomputed = run(engine, policy, rate_rps, seeds, given.requests, oracle)
                name = f"{policy}, true lengths" if oracle else policy
                cells = f"{100.0 * attained:.1f} % | {goodput:.0f} | {100.0 * recomputed:.1f} %"
                print(f"| {engine} | {rate_rps:g} | {name} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
