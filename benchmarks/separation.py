"""Which requests share a server, under which scheduler: capacity of every router beside every policy on one mix.

    python -m benchmarks.separation [--profile opt-66b-a100-tp4] [--replicas 4] [--seeds 3] [--span 120]

FluidServe's author argues that the tightest live TPOT of a server slows everybody there, so that which classes share a
server matters more than how a batch is cut. The mix has his classes: 77 % chat (first token in 5 s, 50 ms a token),
15 % research (10 s, 100 ms), 8 % agents (complete answer in 30 s); lengths are those of the scenarios chat,
summarization and coding. Poisson arrivals, the same requests everywhere, as many as take ``--span`` seconds to arrive
at nine tenths of the fluid bound (docs/simulator.md). Four tables:

- capacity: requests/s per GPU at which 90 % of all requests attain, by the mean of each stage and with every token in
  time, for each router and policy. ``split`` gives chat its own servers, as many as are best on a tuning seed;
- classes: what each class attains at the capacity of ``slo``;
- lengths: capacity when the forecast learns answers that are so many times as long as the true ones, and with the true
  length of each answer known;
- load: at multiples of that capacity, of all requests offered: attained, promised, and promised and kept.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks._sim_commands import RESULTS
from benchmarks.tables import Rows, table
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, single_stage
from slos_serve.perf.lengths import LengthForecast
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.bisection import FINE_TOLERANCE, Bisection
from slos_serve.sim.bounds import fluid_bound, work_of
from slos_serve.sim.conditions import AS_SERVED
from slos_serve.sim.early_stop import EarlyStop
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.interval import ratio_interval, seed_interval
from slos_serve.sim.outcome import Outcome, summarize_run
from slos_serve.sim.profiles import find_profile, limits_of
from slos_serve.sim.question import measured_part
from slos_serve.sim.seeds import table_seeds, tuning_seeds
from slos_serve.sim.sweep import worker_pool
from slos_serve.workload.arrivals import arrival_times
from slos_serve.workload.calls import Workload, empty_calls
from slos_serve.workload.scenarios import from_table

CLASSES = (
    single_stage("chat", SLO(ttft_ms=5_000.0, tpot_ms=50.0)),
    single_stage("research", SLO(ttft_ms=10_000.0, tpot_ms=100.0)),
    single_stage("agent", SLO(e2e_ms=30_000.0)),
)
SHARES = (0.77, 0.15, 0.08)
LENGTHS = (("azure_conv_lengths", 1024), ("arxiv_lengths", 2048), ("azure_code_lengths", 2048))
SPLIT, ASKING = "split", "slo"
ROUTERS = ("least-loaded", "class-preferring", "tpot-bins", SPLIT, ASKING)
SCHEDULERS = ("vllm", "edf", "qoserve", "slos-serve")
FACTORS = (0.28, 0.5, 1.0, 2.0, 3.6)  # 3.6: how far off a rival's length table was
LOADS = (0.8, 1.0, 1.3, 1.6)
TARGET, STOP_BELOW = 0.9, 0.8
METRICS = ("attained", "strict")


@dataclass(frozen=True)
class Case:
    """A way to serve.

    Attributes:
        chat_servers: of ``split``; 0 elsewhere.
        length_factor: the forecast learns answers so many times as long; 0: every length is known.
        requests: of one replica.
    """

    scheduler: str
    router: str
    profile: str
    replicas: int
    requests: int
    chat_servers: int = 0
    length_factor: float = 1.0


@dataclass(frozen=True)
class Found:
    """Shares of all measured requests; ``kept`` of all, not of the promised ones. ``by_class``: class -> attained."""

    attained: float
    strict: float
    promised: float = 0.0
    kept: float = 0.0
    by_class: dict[str, float] = field(default_factory=dict)


def mix(rate_rps: float, count: int, seed: int) -> Workload:
    """The requests; lengths and classes depend on the seed alone."""
    random = np.random.default_rng((seed, 1))
    kinds = random.choice(len(SHARES), size=count, p=SHARES)
    calls = empty_calls(count)
    for kind, (lengths, most) in enumerate(LENGTHS):
        chosen = np.flatnonzero(kinds == kind)
        calls[chosen] = from_table(lengths, most, kind)(len(chosen), random)
    calls["session"] = np.arange(count)
    calls["arrival_s"] = arrival_times("poisson", rate_rps, count, np.random.default_rng((seed, 2)))
    return Workload("separation", CLASSES, calls)


def near_capacity(profile: str) -> float:
    """Requests/s of one replica at nine tenths of the fluid bound of the mix."""
    measured = find_profile(profile)
    work = work_of(mix(1.0, 2000, table_seeds(1)[0]).bound(measured.model))
    return 0.9 * fluid_bound(work, measured.model, limits_of(measured))


def parts_of(workload: Workload, case: Case) -> Iterator[tuple[Workload, NDArray[np.bool_], int]]:
    """What is served apart: (requests, which of them count, servers)."""
    measured = measured_part(workload.num_requests)
    if case.router != SPLIT:
        yield workload, measured, case.replicas
        return
    is_chat = workload.calls["class_index"] == 0
    for chosen, servers in ((is_chat, case.chat_servers), (~is_chat, case.replicas - case.chat_servers)):
        calls = workload.calls[chosen].copy()
        calls["session"] = np.arange(len(calls))
        yield replace(workload, calls=calls), measured[chosen], servers


def joined(outcomes: Sequence[tuple[Outcome, float]]) -> Found:
    """The parts together. ``float``: attained share that was possible when a run was cut short, else 1."""
    count = sum(one.requests for one, _ in outcomes)

    def share(values: Sequence[float]) -> float:
        return sum(values) / count

    return Found(
        share([min(one.attainment, most) * one.requests for one, most in outcomes]),
        share([min(one.strict, most) * one.requests for one, most in outcomes]),
        share([one.admitted for one, _ in outcomes]),
        share([one.admitted_attained for one, _ in outcomes]),
        {name: value for one, _ in outcomes for name, value in one.by_class.items() if value == value},
    )


@contextmanager
def lengths_off(factor: float) -> Iterator[None]:
    """The forecast takes every answer for ``factor`` times as long as it was."""
    learn = LengthForecast.observe

    def observe(forecast: LengthForecast, class_index: int, output_tokens: int) -> None:
        learn(forecast, class_index, max(round(factor * output_tokens), 1))

    with mock.patch.object(LengthForecast, "observe", observe):
        yield


def run(case: Case, rate_rps: float, seed: int, stop: bool = False) -> Found:
    """Serve the mix at ``rate_rps``, all replicas together."""
    profile, ours = find_profile(case.profile), case.scheduler == "slos-serve"
    inside = ASKING if ours else "least-loaded"
    settings = SimSettings(
        policy=case.scheduler,
        parameters=dict(POLICIES[case.scheduler].variants[0]),
        router=inside if case.router == SPLIT else case.router,
        oracle_lengths=case.length_factor == 0.0,
        seed=seed,
    )
    outcomes = []
    with lengths_off(case.length_factor or 1.0):
        for workload, measured, servers in parts_of(mix(rate_rps, case.requests * case.replicas, seed), case):
            until = EarlyStop(measured, STOP_BELOW) if stop else None
            served = AS_SERVED.on(replace(settings, replicas=servers))
            recording = simulate(workload, profile.model, limits_of(profile), served, until)
            bound = until.attainment if until is not None and recording.stopped_early else 1.0
            outcomes.append((summarize_run(recording, measured), bound))
    return joined(outcomes)


def capacity(case: Case, start_rps: float, seed: int) -> dict[str, float]:
    """Requests/s of all replicas at which 90 % attain, by each metric.

    Raises:
        InvalidFieldError: so few requests that they end before their deadlines, however fast they come.
    """
    known: dict[float, Found] = {}
    crossings: dict[str, float] = {}
    for metric in METRICS:
        search = Bisection(crossings.get("attained", 0.0) or start_rps, FINE_TOLERANCE)
        for rate, found in sorted(known.items()):
            search.tell(rate, getattr(found, metric) >= TARGET)
        while (asked := search.next_rate()) is not None:
            known[asked] = run(case, asked, seed, stop=True)
            search.tell(asked, getattr(known[asked], metric) >= TARGET)
        if search.high == math.inf:
            raise InvalidFieldError("requests", case.requests, "more: no rate is too high for so few (--span)")
        crossings[metric] = search.crossing
    return crossings


def pairs() -> list[tuple[str, str]]:
    """(router, policy): only our policy has planners that a router can ask."""
    return [(router, one) for router in ROUTERS for one in SCHEDULERS if router != ASKING or one == "slos-serve"]


def best_split(case: Case, start_rps: float, pool: Executor) -> Case:
    """The number of chat's servers with which it carries most on a tuning seed."""
    (seed,) = tuning_seeds(1)
    tried = [replace(case, chat_servers=count) for count in range(1, case.replicas)]
    found = list(pool.map(partial(capacity, start_rps=start_rps, seed=seed), tried))
    return max(zip(tried, found, strict=True), key=lambda one: one[1]["attained"])[0]


def searched(cases: Sequence[Case], start_rps: float, seeds: Sequence[int], pool: Executor) -> Rows:
    """Each case's capacity per replica on every seed."""
    asked = [(case, start_rps, seed) for case in cases for seed in seeds]
    found = list(pool.map(capacity, *zip(*asked, strict=True)))
    rows: Rows = []
    for at, case in enumerate(cases):
        own = found[at * len(seeds) : (at + 1) * len(seeds)]
        rows.append({**asdict(case), **{name: [one[name] / case.replicas for one in own] for name in METRICS}})
    return rows


def measure(given: argparse.Namespace, pool: Executor) -> dict[str, Rows]:
    """Everything, printed as it comes."""
    near_rps = near_capacity(given.profile)
    base = Case("slos-serve", ASKING, given.profile, given.replicas, round(given.span * near_rps))
    seeds, (tuning,) = table_seeds(given.seeds), tuning_seeds(1)
    start_rps = capacity(base, near_rps * given.replicas, tuning)["attained"]
    cases = [replace(base, router=router, scheduler=one) for router, one in pairs()]
    cases = [best_split(case, start_rps, pool) if case.router == SPLIT else case for case in cases]
    result: dict[str, Rows] = {"capacity": searched(cases, start_rps, seeds, pool)}
    print(capacity_table(result["capacity"]), flush=True)
    ours = next(row for row in result["capacity"] if row["router"] == ASKING)
    full_rps = float(np.mean(ours["attained"])) * given.replicas
    found = pool.map(run, *zip(*[(case, full_rps, seed) for case in cases for seed in seeds], strict=True))
    result["classes"] = [
        {**asdict(case), "seed": seed, **asdict(one)}
        for (case, seed), one in zip([(case, seed) for case in cases for seed in seeds], found, strict=True)
    ]
    print("\n" + classes_table(result["classes"]), flush=True)
    off = [replace(base, length_factor=factor) for factor in (*FACTORS, 0.0)]
    result["lengths"] = searched(off, start_rps, seeds, pool)
    print("\n" + lengths_table(result["lengths"]), flush=True)
    asked = [(base, load * full_rps, seed) for load in LOADS for seed in seeds]
    offered = pool.map(run, *zip(*asked, strict=True))
    result["load"] = [
        {"load": rate / full_rps, "seed": seed, **asdict(one)}
        for (_, rate, seed), one in zip(asked, offered, strict=True)
    ]
    print("\n" + load_table(result["load"]), flush=True)
    return result


def _cell(values: Sequence[float]) -> str:
    low, high = seed_interval(values)
    return f"{np.mean(values):.3g} ({low:.3g}-{high:.3g})"


def capacity_table(rows: Rows) -> str:
    """Routers down, policies across: by the mean / with every token in time; then routers over ``split``, ours."""
    found = {(row["router"], row["scheduler"]): row for row in rows}
    lines = []
    for router in ROUTERS:
        cells = []
        for one in SCHEDULERS:
            row = found.get((router, one))
            sides = f" {row['chat_servers']}+{row['replicas'] - row['chat_servers']}" if row and router == SPLIT else ""
            cells.append(f"{_cell(row['attained'])} / {_cell(row['strict'])}{sides}" if row else "-")
        lines.append([router, *cells])
    together, apart = found[ASKING, "slos-serve"], found[SPLIT, "slos-serve"]
    over = [ratio_interval(together[metric], apart[metric]) for metric in METRICS]
    told = " and ".join(f"{mean:.2f} ({low:.2f}-{high:.2f})" for mean, low, high in over)
    head = ["router", *SCHEDULERS]
    return table(head, lines) + f"\n\nTogether over split, both with our planner: {told} times, by the two metrics."


def classes_table(rows: Rows) -> str:
    """Attained, %, by class, at one rate."""
    lines = []
    for router, one in pairs():
        own = [row for row in rows if (row["router"], row["scheduler"]) == (router, one)]
        shares = [[row["by_class"][name] for row in own] for name in (each.name for each in CLASSES)]
        every = [[row[metric] for row in own] for metric in METRICS]
        lines.append([router, one, *(f"{100 * np.mean(values):.1f}" for values in (*shares, *every))])
    return table(["router", "policy", *(each.name for each in CLASSES), "all", "every token"], lines)


def lengths_table(rows: Rows) -> str:
    """Capacity by the forecast's error, and over that without one."""
    plain = next(row for row in rows if row["length_factor"] == 1.0)
    lines = []
    for row in rows:
        name = f"{row['length_factor']:g} times" if row["length_factor"] else "known"
        over = [
            f"{mean:.2f} ({low:.2f}-{high:.2f})"
            for mean, low, high in (ratio_interval(row[m], plain[m]) for m in METRICS)
        ]
        lines.append([name, _cell(row["attained"]), _cell(row["strict"]), *over])
    return table(["learnt lengths", "by mean", "every token", "over the true ones, by mean", "every token"], lines)


def load_table(rows: Rows) -> str:
    """Offered, promised and kept side by side, %."""
    lines = []
    for load in LOADS:
        own = [row for row in rows if abs(row["load"] - load) < 1e-9]
        means = {
            name: 100 * float(np.mean([row[name] for row in own]))
            for name in ("attained", "strict", "promised", "kept")
        }
        cells = [f"{means[name]:.1f}" for name in ("promised", "kept", "attained", "strict")]
        lines.append([f"{load:g}", *cells, f"{100 * means['kept'] / max(means['promised'], 1e-9):.1f}"])
    return table(["load", "promised", "promised and kept", "attained", "every token", "kept of the promised"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and keep every simulation's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="opt-13b-a100")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--span", type=float, default=120.0, help="seconds of arrivals near the capacity")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    with worker_pool(given.processes) as pool:
        result = measure(given, pool)
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / f"separation-{given.profile}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
