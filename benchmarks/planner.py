"""Time of a full plan by engine size, without and with speculation: p50 and p99 in milliseconds, three TPOT tiers.

The engines are random but overloaded enough that admission has to choose. Exits 1 when a p99 without speculation or the
cold start is over its limit. Times are of the clock; those of the processor stand beside them, for machines that run
something else too.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from tests.builders import OPT_13B_A100, EngineBuilder

# (waiting, running) -> most milliseconds of the p99.
LIMITS_MS = {(16, 64): 0.3, (64, 256): 1.0, (256, 512): 5.0}
PLANS = 400
DRAFTER = dataclasses.replace(OPT_13B_A100, k_s_s=1e-3)
COLD_LIMIT_S = 2.0


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
    spent, worked, labels = [], [], []
    for _ in range(PLANS):
        built = engine(rng, waiting, running)
        view = built.view()
        before = planner.counters.labels
        start_s, start_work_s = time.perf_counter(), time.thread_time()
        planner.plan(built.now_s, view)
        worked.append((time.thread_time() - start_work_s) * 1e3)
        spent.append((time.perf_counter() - start_s) * 1e3)
        labels.append(planner.counters.labels - before)
    return {
        "p50": float(np.percentile(spent, 50)),
        "p99": float(np.percentile(spent, 99)),
        "cpu_p50": float(np.percentile(worked, 50)),
        "cpu_p99": float(np.percentile(worked, 99)),
        "labels_p99": float(np.percentile(labels, 99)),
        "greedy": float(planner.counters.greedy_answers),
    }


def cold_start_s() -> float:
    """Seconds from a fresh interpreter to its first plan; kernels and bytecode cached, as after any first start."""
    code = (
        "import time; start = time.perf_counter()\n"
        "from slos_serve.planning.planner import Planner\n"
        "from slos_serve.planning.warm_up import warm_up\n"
        "from tests.builders import OPT_13B_A100\n"
        "warm_up(Planner(OPT_13B_A100, 3)); print(time.perf_counter() - start)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        # Where bytecode is never written (PYTHONDONTWRITEBYTECODE), compiling numba's sources is half of the start.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = folder
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
            )
    return float(done.stdout)


def main() -> int:
    """Print the table; 1 when something is over its limit."""
    print(
        f"{'drafts':>8}{'waiting':>8}{'running':>8}{'p50 ms':>9}{'p99 ms':>9}{'limit':>7}{'cpu p50':>9}{'cpu p99':>9}"
        f"{'labels p99':>12}{'greedy':>8}"
    )
    over = False
    for drafts in (0, 10):
        settings = PlannerSettings(max_draft_tokens=drafts)
        for (waiting, running), limit_ms in LIMITS_MS.items():
            found = measure(waiting, running, settings)
            print(
                f"{drafts:>8}{waiting:>8}{running:>8}{found['p50']:>9.3f}{found['p99']:>9.3f}{limit_ms:>7.1f}"
                f"{found['cpu_p50']:>9.3f}{found['cpu_p99']:>9.3f}{found['labels_p99']:>12.0f}{found['greedy']:>8.0f}"
            )
            over |= drafts == 0 and found["p99"] > limit_ms
    cold_s = cold_start_s()
    print(f"cold start to first plan, kernels and bytecode cached: {cold_s:.2f} s (limit {COLD_LIMIT_S:.0f} s)")
    return 1 if over or cold_s > COLD_LIMIT_S else 0


if __name__ == "__main__":
    sys.exit(main())
