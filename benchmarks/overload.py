"""Long overload: who keeps what, what the declined get, and how much work is done, beside stock vLLM.

    python -m benchmarks.overload [--minutes 60] [--load 1.6] [--scenario chat] [--policy slos-serve] [--exact]

Loads are multiples of the fluid bound (docs/simulator.md), near what SLOs-Serve carries at 90 %. Requests arrive for so
many minutes as a Poisson process, then the engine is drained. Every policy gets the same requests. The columns that
compare with stock look at the same requests on both sides: those that the policy did not promise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import ideal
from benchmarks._sim_commands import RESULTS
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.bounds import fluid_bound
from slos_serve.sim.conditions import AS_SERVED, EXACT
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import find_profile, limits_of
from slos_serve.sim.question import Question, run_question
from slos_serve.sim.rate_bounds import bound_work
from slos_serve.sim.recording import Recording
from slos_serve.sim.seeds import check_test

OURS, STOCK = "slos-serve", "vllm"
LOADS = (1.0, 1.3, 1.6, 2.0)
SCENARIOS = ("chat", "mixed")


@dataclass(frozen=True)
class Row:
    """One policy under one load.

    Attributes:
        attained, strict, by_class: shares.
        ideal: share that an ideal engine promises (``benchmarks.ideal``); ``None`` for requests of several calls.
        least_class: the worst class's admitted share over the mean admitted share; ``None`` where nobody is admitted.
        promised, promised_kept: share that was admitted, and of those the share that attained.
        tokens: output tokens that came while requests arrived, over stock's.
        drained: stock's time to the last token of all over the policy's.
        goodput, stock_goodput: output tokens a second of requests that attained, until the engine is drained.
        recomputed: share of the computed tokens.
        first_p50_ms, first_p99_ms: first token of those without a promise.
        stock_first_p99_ms: of all requests under stock.
        last_over_stock: median time to the last token of those without a promise, over that of the same under stock.
    """

    scenario: str
    policy: str
    load: float
    rate_rps: float
    requests: int
    attained: float
    ideal: float | None
    strict: float
    by_class: dict[str, float]
    least_class: float | None
    promised: float
    promised_kept: float | None
    tokens: float
    drained: float
    goodput: float
    stock_goodput: float
    recomputed: float
    first_p50_ms: float | None
    first_p99_ms: float | None
    stock_first_p99_ms: float | None
    last_over_stock: float | None
    preemptions: int


def compare(question: Question, load: float, run: Recording, stock: Recording, possible: float | None) -> Row:
    """A run beside stock's run of the same requests."""
    outcome, theirs = summarize_run(run), summarize_run(stock)
    free = (run.calls["admitted"] == 0) & np.isfinite(run.calls["arrival_s"])
    free_done = free & run.completed & stock.completed
    last = [one.calls["done_s"] - one.calls["arrival_s"] for one in (run, stock)]
    return Row(
        scenario=question.scenario,
        policy=question.policy,
        load=load,
        rate_rps=question.rate_rps,
        requests=outcome.requests,
        attained=outcome.attainment,
        ideal=possible,
        strict=outcome.strict,
        by_class=outcome.by_class,
        least_class=least_class(run),
        promised=outcome.admitted / outcome.requests,
        promised_kept=outcome.admitted_attained / outcome.admitted if outcome.admitted else None,
        tokens=tokens_by(run, _last_arrival(run)) / max(tokens_by(stock, _last_arrival(run)), 1),
        drained=stock.end_s / run.end_s,
        goodput=outcome.goodput_tokens_per_s,
        stock_goodput=theirs.goodput_tokens_per_s,
        recomputed=outcome.recomputed,
        first_p50_ms=outcome.unpromised.ttft_ms.p50,
        first_p99_ms=outcome.unpromised.ttft_ms.p99,
        stock_first_p99_ms=theirs.unpromised.ttft_ms.p99,
        last_over_stock=float(np.median(last[0][free_done]) / np.median(last[1][free_done]))
        if free_done.any()
        else None,
        preemptions=outcome.preemptions,
    )


def ideal_share(question: Question) -> float | None:
    """What an ideal engine would promise of the same requests."""
    if question.scenario not in ideal.SCENARIOS:
        return None
    case = ideal.Case(
        question.scenario,
        selective=True,
        replicas=1,
        requests=question.num_requests,
        seeds=1,
        arrivals=question.arrivals,
        drafter=question.drafter,
        acceptance=question.acceptance,
        margin=0.0,
        profile=question.profile,
    )
    return ideal.promised_share(case, 0, question.rate_rps, question.seed)


def _last_arrival(run: Recording) -> float:
    return float(np.nanmax(run.workload.request_arrivals_s))


def tokens_by(run: Recording, at_s: float) -> int:
    """Output tokens of all calls that had come by a moment."""
    owner: NDArray[np.int64] = np.repeat(np.arange(len(run.calls)), run.workload.calls["output_tokens"])
    return int((run.calls["arrival_s"][owner] + run.token_s <= at_s).sum())


def least_class(run: Recording) -> float | None:
    """Smallest share of a class's calls that were admitted, over the mean of the classes; ``None`` without any."""
    calls = run.workload.calls
    came = np.isfinite(run.calls["arrival_s"]) & (np.isfinite(calls["ttft_s"]) | np.isfinite(calls["tpot_s"]))
    kinds = np.unique(calls["class_index"][came])
    shares = [float((run.calls["admitted"] == 1)[came & (calls["class_index"] == kind)].mean()) for kind in kinds]
    return min(shares) / float(np.mean(shares)) if any(shares) else None


def measure(question: Question, load: float, policies: Sequence[str]) -> list[Row]:
    """Every policy on the same requests."""

    def run(policy: str) -> Recording:
        return run_question(
            Question(**{**vars(question), "policy": policy, "parameters": dict(POLICIES[policy].variants[0])})
        )

    stock, possible = run(STOCK), ideal_share(question)
    rows = []
    for policy in policies:
        recording = stock if policy == STOCK else run(policy)
        rows.append(compare(Question(**{**vars(question), "policy": policy}), load, recording, stock, possible))
    return rows


def question_of(scenario: str, load: float, minutes: float, profile: str, seed: int, exact: bool) -> Question:
    """The requests of one cell."""
    base = Question(scenario, STOCK, {}, profile, "poisson", 1.0, 1, seed, conditions=EXACT if exact else AS_SERVED)
    measured = find_profile(profile)
    rate_rps = load * fluid_bound(bound_work(scenario, profile), measured.model, limits_of(measured))
    return Question(**{**vars(base), "rate_rps": rate_rps, "num_requests": max(round(60.0 * minutes * rate_rps), 20)})


HEAD = (
    "scenario",
    "load",
    "policy",
    "attained",
    "of the ideal",
    "every token",
    "promised, kept",
    "worst class / mean",
    "tokens / stock's",
    "drained / stock's",
    "goodput (stock's), tokens/s",
    "recomputed",
    "unpromised: first token p50, p99 (stock's p99)",
    "last token / stock's",
)


def line(row: Row) -> list[str]:
    """Cells of :data:`HEAD`."""
    kept = "-" if row.promised_kept is None else f"{100 * row.promised:.1f}, {100 * row.promised_kept:.1f} %"
    first = [
        "-" if value is None else f"{value / 1000:.1f}"
        for value in (row.first_p50_ms, row.first_p99_ms, row.stock_first_p99_ms)
    ]
    return [
        row.scenario,
        f"{row.load:g}",
        row.policy,
        f"{100 * row.attained:.1f} %",
        "-" if row.ideal is None else f"{row.attained / max(row.ideal, 1e-9):.2f}",
        f"{100 * row.strict:.1f} %",
        kept,
        "-" if row.least_class is None else f"{row.least_class:.2f}",
        f"{row.tokens:.2f}",
        f"{row.drained:.2f}",
        f"{row.goodput:.0f} ({row.stock_goodput:.0f})",
        f"{100 * row.recomputed:.1f} %",
        f"{first[0]}, {first[1]} ({first[2]}) s",
        "-" if row.last_over_stock is None else f"{row.last_over_stock:.2f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table as rows come, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of arrivals")
    parser.add_argument("--load", type=float, action="append", help=f"times the fluid bound; default: {LOADS}")
    parser.add_argument("--scenario", action="append", help=f"default: {SCENARIOS}")
    parser.add_argument("--policy", action="append", help=f"default: {STOCK} and {OURS}")
    parser.add_argument("--profile", default="opt-13b-a100")
    parser.add_argument("--seed", type=int, default=30)
    parser.add_argument("--exact", action="store_true", help="steps take exactly what the profile says")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    check_test([given.seed])
    policies = given.policy or [STOCK, OURS]
    cells = [
        (question_of(scenario, load, given.minutes, given.profile, given.seed, given.exact), load, policies)
        for scenario in given.scenario or SCENARIOS
        for load in given.load or LOADS
    ]
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    rows: list[Row] = []
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        for found in pool.map(measure, *zip(*cells, strict=True)):
            rows += found
            for row in found:
                print("| " + " | ".join(line(row)) + " |", flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / f"overload-{given.profile}.json"
    file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
