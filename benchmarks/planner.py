"""Time of a full plan by engine size, without and with speculation: p50 and p99 in milliseconds, three TPOT tiers.

The engines are random but overloaded enough that admission has to choose. Exits 1 when the p99 without speculation for
64 waiting and 256 running requests is 1 ms or more.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import numpy as np

from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from tests.builders import OPT_13B_A100, EngineBuilder

SIZES = ((16, 64), (64, 256), (256, 512))
PLANS = 400
LIMIT_MS = 1.0
DRAFTER = dataclasses.replace(OPT_13B_A100, k_s_s=1e-3)


def engine(rng: np.random.Generator, waiting: int, running: int) -> EngineBuilder:
    """Running decodes in three tiers and as many waiting requests as asked, of prompt lengths from 20 to 3,000."""
    built = EngineBuilder(total_blocks=20_000, max_num_seqs=1024)
    for _ in range(running):
        tpot_s = float(rng.choice([0.1, 0.15, 0.2]))
        built.decode(
            prompt_tokens=int(rng.integers(20, 200)),
            output_tokens=int(rng.integers(1, 100)),
            tpot_s=tpot_s,
            ahead_s=float(rng.random()) * tpot_s,
            max_tokens=512,
        )
    for _ in range(waiting):
        built.wait(
            int(rng.integers(20, 3000)),
            due_in_s=0.5 + 3.0 * float(rng.random()),
            tpot_s=float(rng.choice([0.1, 0.15, 0.2])),
        )
    return built


def measure(waiting: int, running: int, settings: PlannerSettings) -> dict[str, float]:
    """Milliseconds of ``PLANS`` plans of one size, on engines that differ."""
    rng = np.random.default_rng(0)
    planner = Planner(DRAFTER, 3, settings)
    planner.plan(100.0, engine(rng, 4, 4).view())
    spent, labels = [], []
    for _ in range(PLANS):
        built = engine(rng, waiting, running)
        view = built.view()
        before = planner.counters.labels
        start_s = time.perf_counter()
        planner.plan(built.now_s, view)
        spent.append((time.perf_counter() - start_s) * 1e3)
        labels.append(planner.counters.labels - before)
    return {
        "p50": float(np.percentile(spent, 50)),
        "p99": float(np.percentile(spent, 99)),
        "labels_p99": float(np.percentile(labels, 99)),
        "greedy": float(planner.counters.greedy_answers),
    }


def cold_start_s() -> float:
    """Seconds from a fresh interpreter to its first plan, kernels cached."""
    code = (
        "import time; start = time.perf_counter()\n"
        "from slos_serve.planning.planner import Planner\n"
        "from slos_serve.planning.warm_up import warm_up\n"
        "from tests.builders import OPT_13B_A100\n"
        "warm_up(Planner(OPT_13B_A100, 3)); print(time.perf_counter() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> int:
    """Print the table; 1 when the middle size is over its limit."""
    print(f"{'drafts':>8}{'waiting':>8}{'running':>8}{'p50 ms':>9}{'p99 ms':>9}{'labels p99':>12}{'greedy':>8}")
    over = False
    for drafts in (0, 10):
        settings = PlannerSettings(max_draft_tokens=drafts)
        for waiting, running in SIZES:
            found = measure(waiting, running, settings)
            print(
                f"{drafts:>8}{waiting:>8}{running:>8}{found['p50']:>9.3f}{found['p99']:>9.3f}"
                f"{found['labels_p99']:>12.0f}{found['greedy']:>8.0f}"
            )
            over |= (drafts, waiting, running) == (0, 64, 256) and found["p99"] >= LIMIT_MS
    print(f"cold start to first plan, kernels cached: {cold_start_s():.2f} s")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
