"""Engines, promises and loads made up at random: where SLOs-Serve is behind the best of its rivals.

    python -m benchmarks.worlds [--first 1000] [--count 150] [--processes 2] [--tuning] [--json FILE]

A world is a number: it draws a model (1B to 70B, 8 or 16 bits), devices (V100 to B200, 1 to 8 of them) with batch times
from the roofline, ``max_num_seqs``, a token budget, one of seven scenarios, arrivals, a load of 0.6 to 1.5 times the
fluid bound, and factors on the scenario's TTFT and TPOT. Of each rival the best of its first three parameter sets
counts, chosen in the very world: that favours them. Worlds below 1000 are for choosing constants (``--tuning``).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from benchmarks.matrix import geometric_mean
from slos_serve.core.slo import SLO, SLOClass
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.roofline import ACTIVATION_BYTES, DEVICES, MEMORY_SHARE, Device, ModelShape, roofline
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.bounds import fluid_bound, work_of
from slos_serve.sim.conditions import AS_SERVED
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.question import measured_part
from slos_serve.sim.sweep import worker_pool
from slos_serve.workload.calls import Workload
from slos_serve.workload.scenarios import make_workload

FIRST_TEST_WORLD = 1000
OURS, RIVALS, SETS = "slos-serve", ("qoserve", "edf", "scorpio", "vllm"), 3
GPUS = (
    Device("L4", 121e12, 0.3e12, 24e9),
    Device("A10", 125e12, 0.6e12, 24e9),
    Device("A100-40", 312e12, 1.555e12, 42e9),
    *(DEVICES[name] for name in ("a100", "h100", "h200")),
    Device("B200", 2250e12, 8e12, 190e9),
    Device("L40S", 362e12, 0.864e12, 48e9),
    Device("V100", 125e12, 0.9e12, 32e9),
)
# Layers, hidden, width of all heads, width of KV, width of the feed-forward part, vocabulary.
MODELS = {
    "1B": (16, 2048, 2048, 512, 8192, 128_256),
    "3B": (28, 3072, 3072, 1024, 8192, 128_256),
    "7B": (32, 4096, 4096, 4096, 11_008, 32_000),
    "8B": (32, 4096, 4096, 1024, 14_336, 128_256),
    "14B": (40, 5120, 5120, 1024, 13_824, 152_064),
    "30B": (48, 7168, 7168, 7168, 28_672, 50_272),
    "32B": (64, 5120, 5120, 1024, 27_648, 152_064),
    "70B": (80, 8192, 8192, 1024, 28_672, 128_256),
}
SCENARIOS = ("chat", "coding", "mixed", "summarization", "tool", "reasoning", "long")
REQUESTS, USUAL_REQUESTS = {"tool": 150, "reasoning": 120, "long": 300}, 500
SPAN_S, MOST_REQUESTS = 60.0, 1500  # requests arrive for so long, within so many of them
LEAST_KV_TOKENS, SLOWEST_STEP_S, TIGHTEST_TPOT_S, PACE_OVER_STEP = 8_000, 0.045, 0.05, 1.4
SEED = 5  # of lengths and arrivals


@dataclass(frozen=True)
class World:
    """An engine and what is asked of it; ``ttft`` and ``tpot`` are factors on what the scenario promises."""

    engine: str
    model: BatchTimeModel
    limits: EngineLimits
    scenario: str
    arrivals: str
    load: float
    ttft: float
    tpot: float

    def workload(self, rate_rps: float, count: int, arrivals: str) -> Workload:
        """So many requests."""
        made = make_workload(self.scenario, rate_rps, count, SEED, arrivals)
        return replace(made, classes=tuple(self._promised(one) for one in made.classes))

    def asked(self) -> Workload:
        """What arrives."""
        sample = self.workload(1.0, 1000, "poisson").bound(self.model)
        rate_rps = self.load * fluid_bound(work_of(sample), self.model, self.limits)
        count = REQUESTS.get(self.scenario, USUAL_REQUESTS)
        if count < SPAN_S * rate_rps:
            count = int(min(SPAN_S * rate_rps, MOST_REQUESTS))
        return self.workload(rate_rps, count, self.arrivals)

    def _promised(self, slo_class: SLOClass) -> SLOClass:
        return replace(
            slo_class, stages=tuple(replace(stage, slo=self._scaled(stage.slo)) for stage in slo_class.stages)
        )

    def _scaled(self, slo: SLO) -> SLO:
        def times(value: float | None, factor: float) -> float | None:
            return value * factor if value else value

        return replace(
            slo,
            ttft_ms=times(slo.ttft_ms, self.ttft),
            ttft_slowdown=times(slo.ttft_slowdown, self.ttft),
            tpot_ms=times(slo.tpot_ms, self.tpot),
        )


def world(number: int) -> World:
    """The world of a number."""
    rng = np.random.default_rng((number, 777))
    name, model, limits = _engine(rng)
    scenario = SCENARIOS[rng.integers(len(SCENARIOS))]
    arrivals = str(rng.choice(["poisson", "poisson", "gamma:3", "azure-conv", "azure-code"]))
    load, ttft = float(rng.choice([0.6, 0.8, 1.0, 1.5])), float(rng.choice([0.7, 1.0, 1.0, 2.0, 5.0]))
    tpot = float(rng.choice([1.0, 1.0, 0.6, 2.0, 4.0]))
    if tpot * TIGHTEST_TPOT_S < PACE_OVER_STEP * (model.b_m_s + model.b_c_s):
        tpot = 1.0  # no engine could keep it
    return World(name, model, limits, scenario, arrivals, load, ttft, tpot)


def _engine(rng: Generator) -> tuple[str, BatchTimeModel, EngineLimits]:
    """The first draw whose KV cache and step are of use."""
    while True:
        name = list(MODELS)[rng.integers(len(MODELS))]
        layers, hidden, heads, kv, inner, words = MODELS[name]
        gpu, count = GPUS[rng.integers(len(GPUS))], int(rng.choice([1, 1, 2, 4, 8]))
        weight = float(rng.choice([2.0, 2.0, 1.0]))
        parameters = layers * (hidden * (2 * heads + 2 * kv) + 3 * hidden * inner)
        shape = ModelShape(layers, hidden, heads, kv, float(parameters), 2.0 * hidden * words, weight)
        weights = (shape.layer_parameters + shape.embedding_parameters) * weight
        tokens = int(
            max((MEMORY_SHARE * gpu.memory - ACTIVATION_BYTES) * count - weights, 0.0) / shape.kv_bytes_per_token
        )
        model = roofline(shape, gpu, count)
        if tokens < LEAST_KV_TOKENS or model.b_m_s + model.b_c_s > SLOWEST_STEP_S:
            continue
        budget, seats = int(rng.choice([2048, 8192])), int(rng.choice([256, 256, 64]))
        limits = EngineLimits(
            kv_capacity_tokens=tokens // 16 * 16, block_size=16, max_num_seqs=seats, max_num_batched_tokens=budget
        )
        return f"{name}, {8 * weight:.0f} bits, {count} x {gpu.name}", model, limits


def served(one: World, policy: str, parameters: dict[str, Any]) -> dict[str, float]:
    """What a policy makes of a world."""
    load = one.asked()
    settings = AS_SERVED.on(SimSettings(policy=policy, parameters=parameters, seed=SEED))
    outcome = summarize_run(simulate(load, one.model, one.limits, settings), measured_part(load.num_requests))
    return {
        "mean": outcome.attainment,
        "strict": outcome.strict,
        "kept": outcome.admitted_attained / outcome.admitted if outcome.admitted else 1.0,
        "recomputed": outcome.recomputed,
        "tokens_per_s": outcome.output_tokens_per_s,
    }


def row_of(number: int) -> dict[str, Any]:
    """A world and what everybody makes of it; of a rival's parameter sets the best by the mean."""
    one = world(number)
    row: dict[str, Any] = {"world": number, "kv_tokens": one.limits.kv_capacity_tokens}
    row |= {name: value for name, value in asdict(one).items() if name not in ("model", "limits")}
    row |= {"max_num_seqs": one.limits.max_num_seqs, "max_num_batched_tokens": one.limits.max_num_batched_tokens}
    row[OURS] = served(one, OURS, {})
    for policy in RIVALS:
        sets = [served(one, policy, dict(variant)) for variant in POLICIES[policy].variants[:SETS]]
        row[policy] = max(sets, key=lambda found: found["mean"])
    return row


def over_best(row: dict[str, Any], metric: str) -> tuple[float, str]:
    """Points of ours over the best rival, and who that is."""
    best = max(RIVALS, key=lambda policy: float(row[policy][metric]))
    return 100.0 * (row[OURS][metric] - row[best][metric]), best


def table(rows: Sequence[dict[str, Any]], most: int = 20) -> str:
    """Markdown: the worlds in which ours is furthest behind by the mean, and a summary."""
    columns = ["world", "engine", "KV, tokens", "scenario", "arrivals", "load", "ours, %", "best rival", "points"]
    lines = ["| " + " | ".join([*columns, "every token, points"]) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in sorted(rows, key=lambda row: over_best(row, "mean")[0])[:most]:
        points, best = over_best(row, "mean")
        cells = [str(row["world"]), row["engine"], f"{row['kv_tokens'] // 1000}k", row["scenario"], row["arrivals"]]
        cells += [f"{row['load']:g}", f"{100.0 * row[OURS]['mean']:.1f}", f"{best} {100.0 * row[best]['mean']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{points:+.1f}", f"{over_best(row, 'strict')[0]:+.1f}"]) + " |")
    said = [f"{len(rows)} worlds."]
    for metric, label in (("mean", "by the mean"), ("strict", "with every token in time")):
        over = [over_best(row, metric)[0] for row in rows]
        share = 100.0 * float(np.mean([row[OURS][metric] for row in rows]))
        behind = sum(points < -1.0 for points in over)
        said.append(
            f"Attained {label}: {share:.1f} %, {np.mean(over):+.1f} points over the best rival of each, "
            f"behind it by more than one point in {behind}."
        )
    kept, again = (100.0 * float(np.mean([row[OURS][key] for row in rows])) for key in ("kept", "recomputed"))
    tokens = geometric_mean([row[OURS]["tokens_per_s"] / row["vllm"]["tokens_per_s"] for row in rows])
    said.append(f"Promises kept: {kept:.1f} %. Computed again: {again:.2f} %. Tokens/s: {tokens:.3f} of stock's.")
    return "\n".join([*lines, "", *said])


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate worlds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=FIRST_TEST_WORLD)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tuning", action="store_true", help="the worlds are for choosing constants")
    parser.add_argument("--json", type=Path, help="keep the rows here")
    given = parser.parse_args(arguments)
    numbers = range(given.first, given.first + given.count)
    if given.count < 1 or given.first < 0:
        parser.error("--first must be 0 or more, --count 1 or more")
    if given.tuning and numbers[-1] >= FIRST_TEST_WORLD:
        parser.error(f"--tuning takes worlds below {FIRST_TEST_WORLD}")
    if not given.tuning and given.first < FIRST_TEST_WORLD:
        parser.error(f"worlds below {FIRST_TEST_WORLD} are for choosing constants: give --tuning")
    rows = []
    with worker_pool(given.processes) as pool:
        for done in as_completed([pool.submit(row_of, number) for number in numbers]):
            rows.append(done.result())
            if len(rows) % 10 == 0:
                print(f"{len(rows)} of {len(numbers)} worlds", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: int(row["world"]))
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0 if all(math.isfinite(row[OURS]["mean"]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
