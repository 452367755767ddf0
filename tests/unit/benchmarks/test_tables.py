"""``python -m benchmarks.tables``: what it makes of stored rows."""

from __future__ import annotations

from benchmarks.tables import ablation, capacity


def test_an_ablation_shows_both_shares_and_their_mean() -> None:
    cells = {"chat": {"attained": 0.9, "strict": 0.8}, "coding": {"attained": 0.7, "strict": 0.5}}
    told = ablation([{"variant": "no turns", "cells": cells}])
    assert told.endswith("| no turns | 90.0 / 80.0 | 70.0 / 50.0 | 80.0 / 65.0 |")


def test_capacities_are_those_of_one_engine_with_own_arrivals_and_the_best_rival_comes_first() -> None:
    def found(policy: str, rps: float) -> dict[str, object]:
        each = {"capacity_rps_per_gpu": rps, "strict_rps_per_gpu": rps / 2, "ci": [rps - 0.1, rps + 0.1]}
        return {**each, "policy": policy, "by_prompt_quartile": [0.9] * 4, "fluid_bound_rps_per_gpu": 1.8}

    capacities = [found("slos-serve", 1.5), found("vllm", 0.5), found("edf", 1.2)]
    row = {"engine": "opt-13b-a100", "scenario": "chat", "arrivals": "scenario", "capacities": capacities}
    flat = {"engine": "opt-13b-a100", "scenario": "tool", "arrivals": "scenario", "flat": True}
    told = capacity([row, {**row, "arrivals": "poisson"}, {**row, "engine": "llama-2-7b-h100"}, flat])
    first = "| chat | 1.5 (1.4-1.6) / 0.75 | edf 1.2 (1.1-1.3) / 0.6 | vllm 0.5 (0.4-0.6) / 0.25 | - | 2 |"
    assert told.count("| chat |") == 2 and first in told
    assert told.endswith("| chat | 90 90 90 90 | edf 90 90 90 90 |")
