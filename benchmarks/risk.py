"""What planning at a higher quantile of step times costs and keeps: the curve behind ``step_quantile``.

OPT-13B on an A100 in the simulator, one replica, Poisson arrivals at a share of the fluid bound over 0.9, step times
with log-normal noise. For each quantile: the share of admitted requests that attained, and that of all. Prints a
Markdown table; a few minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from slos_serve.sim.bounds import fluid_bound
from slos_serve.sim.conditions import Conditions
from slos_serve.sim.profiles import find_profile, limits_of
from slos_serve.sim.question import Answer, Question, answer
from slos_serve.sim.rate_bounds import bound_work
from slos_serve.sim.seeds import tuning_seeds

PROFILE = "opt-13b-a100"
NOISES = (0.0, 0.1, 0.2)
QUANTILES = (0.5, 0.7, 0.9, 0.95, 0.99)
SCENARIOS = ("chat", "coding")


def run(scenario: str, rate_rps: float, quantile: float, noise: float, requests: int, seeds: int) -> list[Answer]:
    """Answers of every seed with batches planned at ``quantile``."""
    given = {"step_quantile": quantile}
    return [
        answer(
            Question(
                scenario,
                "slos-serve",
                given,
                PROFILE,
                "poisson",
                rate_rps,
                requests,
                seed,
                conditions=Conditions(noise=noise),
            )
        )
        for seed in tuning_seeds(seeds)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--load", type=float, default=0.85, help="share of (fluid bound / 0.9)")
    given = parser.parse_args(arguments)
    profile = find_profile(PROFILE)
    print("| scenario | noise (CV) | quantile | admitted that attain | all that attain |")
    print("|---|---|---|---|---|")
    for scenario in SCENARIOS:
        work = bound_work(scenario, PROFILE, 8000)
        rate_rps = given.load * fluid_bound(work, profile.model, limits_of(profile)) / 0.9
        for noise in NOISES:
            for quantile in QUANTILES:
                found = run(scenario, rate_rps, quantile, noise, given.requests, given.seeds)
                admitted = np.mean([one.admitted_attained or 0.0 for one in found])
                every = np.mean([one.attainment for one in found])
                print(f"| {scenario} | {noise:.2f} | {quantile:.2f} | {admitted:.4f} | {every:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
