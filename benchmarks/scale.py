"""One router for 256 replicas against many that share them: attainment and what a decision costs.

python -m benchmarks.scale [--replicas 256] [--rate 2500] [--rate 5000] [--requests 60000] [--output benchmarks/results]

Chat on Llama-2-7B/H100, gamma arrivals of CV 4 (a fleet's own burstiness), SLOs-Serve in every replica. A run with
``n`` routers: a request reaches one of them, which sees its 256/n replicas, and asks one other when none attains. The
fluid bound of the fleet is printed first: at 2,500 requests/s it is busy, at 5,000 overloaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._sim_commands import RESULTS
from slos_serve.routing.router import RoutingDecision, RoutingRequest
from slos_serve.sim import slo_router
from slos_serve.sim.bounds import fluid_bound, work_of
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import find_profile, limits_of
from slos_serve.workload.scenarios import make_workload

SEED = 22  # one of those that only tables use (benchmarks/README.md)
RATES = (2500.0, 5000.0)
# Router, how many of them, how many others each asks.
SETTINGS = (
    ("least-loaded", 1, 0),
    ("slo-spread", 1, 0),
    ("slo-spread", 8, 0),
    ("slo-spread", 8, 1),
    ("slo-spread", 32, 1),
)


def measure(rate: float, setting: tuple[str, int, int], given: argparse.Namespace) -> dict[str, Any]:
    """One run; wall time of each decision, reservation and publications of that moment not counted in."""
    router, routers, tries = setting
    decide, took_s = slo_router.route_sharded, []

    def timed(now_s: float, request: RoutingRequest, *rest: Any) -> RoutingDecision:
        began = time.perf_counter()
        decision = decide(now_s, request, *rest)
        took_s.append(time.perf_counter() - began)
        return decision

    slo_router.route_sharded = timed  # type: ignore[assignment]  # the same, with a clock
    profile = find_profile(given.profile)
    load = make_workload(given.scenario, rate, given.requests, SEED, given.arrivals)
    settings = SimSettings(replicas=given.replicas, router=router, routers=routers, router_tries=tries)
    began = time.perf_counter()
    outcome = summarize_run(simulate(load, profile.model, limits_of(profile), settings))
    p50, p99 = (1000.0 * float(np.quantile(took_s, q)) if took_s else None for q in (0.5, 0.99))
    return {
        "rate_rps": rate,
        "router": router,
        "routers": routers,
        "tries": tries,
        "attained": outcome.attained / outcome.requests,
        "admitted_attained": outcome.admitted_attained / max(outcome.admitted, 1),
        "decision_ms": {"p50": p50, "p99": p99},
        "wall_s": time.perf_counter() - began,
    }


def main() -> None:
    """Every setting on the same requests, at each rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=256)
    parser.add_argument("--rate", type=float, action="append", help="may be repeated; default: 2500 and 5000")
    parser.add_argument("--requests", type=int, default=60_000)
    parser.add_argument("--scenario", default="chat")
    parser.add_argument("--arrivals", default="gamma:4")
    parser.add_argument("--profile", default="llama-2-7b-h100")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    profile = find_profile(given.profile)
    work = work_of(make_workload(given.scenario, 1.0, 20_000, 0, "poisson").bound(profile.model))
    bound = given.replicas * fluid_bound(work, profile.model, limits_of(profile))
    print(f"fluid bound / 0.9 of the fleet: {bound / 0.9:.0f} requests/s")
    columns = ("requests/s", "router", "routers", "others asked", "attained", "of admitted", "p50 ms", "p99 ms")
    print("".join(f"{name:>14}" for name in columns))
    rows, runs = [], [(rate, setting) for rate in given.rate or RATES for setting in SETTINGS]
    with ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(measure, *zip(*runs, strict=True), [given] * len(runs)):
            rows.append(row)
            shares = [f"{row[name]:.1%}" for name in ("attained", "admitted_attained")]
            times = ["-" if value is None else f"{value:.3f}" for value in row["decision_ms"].values()]
            cells = (row["rate_rps"], row["router"], row["routers"], row["tries"], *shares, *times)
            print("".join(f"{cell:>14}" for cell in cells), flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "scale.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
