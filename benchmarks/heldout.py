"""Attained, every token in time and admitted that attain, on seeds that no constant was chosen on.

    python -m benchmarks.heldout [--requests 600] [--seeds 22 23] [--noise 0.15] [--bias 1.1] [--profile opt-13b-a100]

Seeds 0 to 11 are for tuning; tables use others (benchmarks/README.md). Rates are those of OPT-13B on an A100, near the
planner's capacity. ``recomputed`` is the share of tokens computed again after a preemption.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slos_serve.sim.capacity import COOL_DOWN_SHARE, WARM_UP_SHARE
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.model_error import ModelError
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
from slos_serve.workload.scenarios import make_workload

RATES_RPS = {"chat": 2.75, "coding": 0.29, "mixed": 1.58, "summarization": 1.06, "tool": 0.042, "reasoning": 0.21}
LONG = ("tool", "reasoning")


@dataclass(frozen=True)
class Cell:
    """Means over seeds of one scenario, as shares."""

    attained: float
    strict: float
    admitted_attained: float
    recomputed: float


def measure(scenario: str, seeds: Sequence[int], requests: int, profile_name: str, error: ModelError) -> Cell:
    """Simulate a scenario with every seed; half as many requests where answers are long."""
    profile, found = find_profile(profile_name), []
    for seed in seeds:
        count = requests // 2 if scenario in LONG else requests
        load = make_workload(scenario, RATES_RPS[scenario], count, seed)
        settings = SimSettings(error=error, kv_bytes_per_token=kv_bytes_per_token(profile), seed=seed)
        recording = simulate(load, profile.model, limits_of(profile), settings)
        measured = np.zeros(load.num_requests, dtype=np.bool_)
        measured[int(WARM_UP_SHARE * len(measured)) : int((1.0 - COOL_DOWN_SHARE) * len(measured))] = True
        outcome, calls = summarize_run(recording, measured), load.calls
        kept = recording.calls["output_tokens"] - 1 - recording.calls["cached_tokens"]
        needed = float((calls["prompt_tokens"] + kept)[recording.completed].sum())
        computed = float(recording.steps.rows["new_tokens"].sum())
        found.append(
            (
                outcome.attainment,
                outcome.strict,
                outcome.admitted_attained / max(outcome.admitted, 1),
                computed / needed - 1.0,
            )
        )
    return Cell(*np.mean(found, axis=0).tolist())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[22, 23])
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--bias", type=float, default=1.0)
    parser.add_argument("--profile", default="opt-13b-a100")
    given = parser.parse_args(arguments)
    print(
        "| scenario | attained, % | every token, % | admitted that attain, % | recomputed, % |\n|---|---|---|---|---|"
    )
    rows = []
    for scenario in RATES_RPS:
        cell = measure(scenario, given.seeds, given.requests, given.profile, ModelError(given.bias, given.noise))
        rows.append((cell.attained, cell.strict, cell.admitted_attained, cell.recomputed))
        print(f"| {scenario} | " + " | ".join(f"{100.0 * value:.1f}" for value in rows[-1]) + " |", flush=True)
    print("| mean | " + " | ".join(f"{100.0 * value:.1f}" for value in np.mean(rows, axis=0)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
