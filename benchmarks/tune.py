"""The same budget of trials for every policy, on tuning seeds and engines only: the parameters that tables use.

    python -m benchmarks.tune [--trials 8] [--seeds 0 1] [--requests 150] [--scenario chat ...] [--policy NAME ...]

Each policy's first trial is its default parameters. The others are drawn from its grid (``SPACES``), all distinct.
A grid that is smaller than the budget is tried whole. A trial is the mean share attained over scenarios, loads and
seeds, the server simulated as in tables (``AS_SERVED``). The best trial of each policy goes to ``results/tuned.json``,
written after every policy. ``distserve`` has nothing to draw: its split is searched with every capacity.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.heldout import RATES_RPS
from slos_serve.policies.registry import policy_entry
from slos_serve.sim.question import Answer, Question, answer
from slos_serve.sim.seeds import TUNING_ENGINES, check_tuning, check_tuning_engine
from slos_serve.sim.sweep import AnswerFile

Grid = Mapping[str, Sequence[Any]]
OUTPUT = Path(__file__).resolve().parent / "results" / "tuned.json"
SCENARIOS = ("chat", "coding", "mixed")
# Shares of the rate that our planner carries on the tuning engine: below most rivals' capacity, and above it.
LOADS = (0.7, 1.0)
_JITSERVE: Grid = {
    "token_budget": (256, 512, 1024, 2048),
    "frame_steps": (1, 10, 50),
    "lateness_power": (1.0, 4.0, 8.0, 20.0),
    "top_k": (2, 4),
    "drop_after_s": (0.0, 1.0, 5.0),
    "length_quantile": (0.5, 0.7, 0.9),
}
SPACES: dict[str, Grid] = {
    "slos-serve": {
        "margin": (0.02, 0.05, 0.1),
        "step_quantile": (0.9, 0.95, 0.99),
        "length_quantile": (0.5, 0.7, 0.9),
        "aging_s": (5.0, 10.0, 30.0),
        "length_weight": (0.0, 0.5),
    },
    "vllm": {"token_budget": (512, 1024, 2048, 4096, 8192)},
    "vllm-v0": {"token_budget": (2048, 4096, 8192, 16_384)},
    "sarathi": {"chunk_tokens": (128, 256, 384, 512, 768, 1024, 1536, 2048)},
    "scorpio": {"chunk_tokens": (0, 256, 512, 1024, 2048), "token_budget": (2048, 4096, 8192)},
    "edf": {"token_budget": (256, 512, 1024, 2048), "drop_late": (False, True), "watermark": (0.0, 0.01, 0.05)},
    "qoserve": {
        "alpha_ms": (0.0, 0.5, 1.0, 2.0, 8.0),
        "time_margin": (0.0, 0.1, 0.2, 0.4),
        "max_tokens": (512, 1024, 2552, 4096),
        "watermark": (0.01, 0.05),
    },
    "jitserve": _JITSERVE,
    "jitserve-oracle": _JITSERVE,
}


@dataclass(frozen=True)
class Setup:
    """What every trial is run on.

    Attributes:
        trials: parameter sets tried of each policy, its default one included.
        requests: of each simulation.
        loads: shares of ``heldout.RATES_RPS``.
    """

    trials: int
    profile: str
    scenarios: tuple[str, ...]
    loads: tuple[float, ...]
    seeds: tuple[int, ...]
    requests: int

    def __post_init__(self) -> None:
        check_tuning(self.seeds)
        check_tuning_engine(self.profile)


@dataclass(frozen=True)
class Trial:
    """Means over scenarios, loads and seeds, as shares."""

    parameters: Mapping[str, Any]
    attained: float
    strict: float
    by_scenario: Mapping[str, float]


def candidates(policy: str, trials: int) -> list[dict[str, Any]]:
    """The default parameters, then distinct draws from the grid; the same ones whenever asked."""
    grid = SPACES[policy]
    size = math.prod(len(values) for values in grid.values())
    chosen = [dict(policy_entry(policy).variants[0])]
    for number in np.random.default_rng(7).permutation(size):
        drawn, rest = {}, int(number)
        for name, values in grid.items():
            rest, at = divmod(rest, len(values))
            drawn[name] = values[at]
        if drawn not in chosen:
            chosen.append(drawn)
    return chosen[:trials]


def run_trial(policy: str, parameters: Mapping[str, Any], setup: Setup, known: AnswerFile) -> Trial:
    """Simulate one parameter set on everything."""
    found: dict[str, list[Answer]] = {}
    for scenario in setup.scenarios:
        for load in setup.loads:
            for seed in setup.seeds:
                question = Question(
                    scenario=scenario,
                    policy=policy,
                    parameters=parameters,
                    profile=setup.profile,
                    arrivals="scenario",
                    rate_rps=load * RATES_RPS[scenario],
                    num_requests=setup.requests,
                    seed=seed,
                )
                one = known.get(question)
                if one is None:
                    one = answer(question)
                    known.put(question, one)
                found.setdefault(scenario, []).append(one)
    by_scenario = {name: float(np.mean([one.attainment for one in answers])) for name, answers in found.items()}
    strict = float(np.mean([one.strict for answers in found.values() for one in answers]))
    return Trial(dict(parameters), float(np.mean(list(by_scenario.values()))), strict, by_scenario)


def as_json(setup: Setup, tried: Mapping[str, Sequence[Trial]]) -> dict[str, Any]:
    """What is stored: the setup, and of each policy the best trial beside its default and all others."""
    policies = {}
    for policy, trials in tried.items():
        best = max(trials, key=lambda trial: trial.attained)
        policies[policy] = {
            "parameters": best.parameters,
            "attained": best.attained,
            "default_attained": trials[0].attained,
            "trials": [asdict(trial) for trial in trials],
        }
    return {"setup": asdict(setup), "policies": policies}


def stored_trials(path: Path, setup: Setup) -> dict[str, list[Trial]]:
    """Trials of an earlier run with the same setup; nothing of any other."""
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["setup"] != json.loads(json.dumps(asdict(setup))):
        return {}
    return {name: [Trial(**trial) for trial in row["trials"]] for name, row in stored["policies"].items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, print a Markdown table, and store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--profile", default=TUNING_ENGINES[0])
    parser.add_argument("--scenario", nargs="+", choices=RATES_RPS, default=list(SCENARIOS))
    parser.add_argument("--policy", nargs="+", choices=SPACES, default=list(SPACES))
    parser.add_argument("--resume", type=Path, help="keep every simulation here and reuse what is there")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args(arguments)
    setup = Setup(given.trials, given.profile, tuple(given.scenario), LOADS, tuple(given.seeds), given.requests)
    known = AnswerFile(given.resume)
    tried = stored_trials(given.output, setup)
    print(
        "| policy | trials | default attained, % | best, % | every token, % | parameters |\n|---|---|---|---|---|---|"
    )
    for policy in given.policy:
        trials = [run_trial(policy, one, setup, known) for one in candidates(policy, setup.trials)]
        tried[policy] = trials
        best = max(trials, key=lambda trial: trial.attained)
        shares = (100.0 * value for value in (trials[0].attained, best.attained, best.strict))
        print(f"| {policy} | {len(trials)} | " + " | ".join(f"{x:.1f}" for x in shares) + f" | {best.parameters} |")
        sys.stdout.flush()
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(as_json(setup, tried), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
