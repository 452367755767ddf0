"""Whole tasks of agents beside chats and answers with deadlines: what every policy keeps, and ours with true lengths.

    python -m benchmarks.agents [--scenario agents | compound] [--seconds 300] [--seeds 22 23]

Scenario ``agents`` as served, or ``compound``, whose tasks are JITServe's: 2 to 6 calls, 8 s each. Loads from easy to
hopeless. Every policy is told when each call of a task is due, by the same book of tasks (``perf/tasks.py``). Rivals
run with their tuned parameters (``policies/registry.py``). A task is kept when its last answer ends in time; a request
is a chat, an answer or a task. Goodput counts the tokens of requests that were kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from slos_serve.core.tasks import task_of
from slos_serve.metrics.bulk import requests_attained
from slos_serve.sim.conditions import AS_SERVED
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.outcome import score, summarize_run
from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
from slos_serve.sim.question import measured_part
from slos_serve.sim.recording import Recording
from slos_serve.sim.seeds import check_test
from slos_serve.workload.scenarios import make_workload

LOADS = {
    "agents": {"opt-13b-a100": (0.5, 0.8, 1.2), "llama-2-7b-h100": (2.0, 3.0, 4.0)},
    "compound": {"opt-13b-a100": (0.8, 1.2, 1.8), "llama-2-7b-h100": (4.0, 6.0, 9.0)},
}
OURS = "slos-serve"
RIVALS = ("vllm", "sarathi", "edf", "qoserve", "jitserve")


def run(
    scenario: str, engine: str, policy: str, rate_rps: float, seeds: Sequence[int], requests: int, oracle: bool
) -> list[float]:
    """Means over seeds: requests kept; chats, answers and tasks kept; goodput in tokens/s.

    Args:
        oracle: whether the policy is told the true lengths of answers.
    """
    profile, found = find_profile(engine), []
    for seed in seeds:
        load = make_workload(scenario, rate_rps, requests, seed)
        settings = AS_SERVED.on(
            SimSettings(policy=policy, oracle_lengths=oracle, kv_bytes_per_token=kv_bytes_per_token(profile), seed=seed)
        )
        recording = simulate(load, profile.model, limits_of(profile), settings)
        outcome = summarize_run(recording, measured_part(load.num_requests))
        found.append([outcome.attainment, *shares(recording), outcome.goodput_tokens_per_s])
    return [float(value) for value in np.mean(found, axis=0)]


def shares(recording: Recording) -> list[float]:
    """Of the requests that count: shares of chats, answers and tasks kept."""
    load, calls = recording.workload, recording.workload.calls
    kept = requests_attained(score(recording).attained, np.ascontiguousarray(calls["session"]), load.num_requests)
    kinds = np.array([2 if task_of(one) else 1 if one.slo.e2e_ms else 0 for one in load.classes])
    first = calls[np.isfinite(calls["arrival_s"])]
    kind = np.empty(load.num_requests, dtype=np.int64)
    kind[first["session"]] = kinds[first["class_index"]]
    measured = measured_part(load.num_requests)
    return [float(kept[measured & (kind == index)].mean()) for index in range(3)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300, help="how long requests arrive; tasks take up to 150 s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[22, 23])
    parser.add_argument("--engines", nargs="+", choices=sorted(LOADS["agents"]), default=list(LOADS["agents"]))
    parser.add_argument("--scenario", choices=sorted(LOADS), default="agents")
    given = parser.parse_args(arguments)
    seeds = check_test(given.seeds)
    print("| engine | requests/s | policy | kept | chats | answers | tasks | goodput tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for engine in given.engines:
        for rate_rps in LOADS[given.scenario][engine]:
            for policy, oracle in (*((name, False) for name in (*RIVALS, OURS)), (OURS, True)):
                requests = round(rate_rps * given.seconds)
                *kept, goodput = run(given.scenario, engine, policy, rate_rps, seeds, requests, oracle)
                name = f"{policy}, true lengths" if oracle else policy
                cells = " | ".join(f"{100.0 * share:.1f} %" for share in kept)
                print(f"| {engine} | {rate_rps:g} | {name} | {cells} | {goodput:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
