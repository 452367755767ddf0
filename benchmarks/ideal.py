"""What an ideal engine would promise: the room that is left to a planner.

python -m benchmarks.ideal [--scenario summarization] [--requests 1000] [--seeds 4]
python -m benchmarks.ideal --replicas 4 --requests 200 --seeds 1 --arrivals scenario --drafter opt-125m

A fluid engine (by default OPT-13B/A100) that knows every length: work is divided as finely as one likes, prompts go by
earliest deadline, decodes run ahead whenever nobody waits and cost nothing fixed while they are ahead, and every
verification brings its mean. Whether a request can be promised is found by running the engine on without further
arrivals; who is declined leaves at once and costs nothing. Prints the highest rate at which 90 % are promised and so
kept, and its share of fluid bound / 0.9: when everybody who fits is promised in order of arrival, and when the
costliest promise whose prompt has not begun gives way to a cheaper one. For scenarios of one call a request. Where
prompts begin alike, the engine has computed every beginning that came before. Seeds are those of tables.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from benchmarks._sim_commands import RESULTS
from slos_serve.sim.bounds import fluid_bound, work_of
from slos_serve.sim.drafters import DRAFTERS, NO_DRAFTER, with_drafter
from slos_serve.sim.profiles import find_profile, limits_of
from slos_serve.sim.seeds import table_seeds
from slos_serve.workload.prefixes import cached_at_best
from slos_serve.workload.scenarios import make_workload

SCENARIOS = ("chat", "coding", "mixed", "summarization", "reasoning", "long")
PROFILE = "opt-13b-a100"
TARGET = 0.9
SLICE_S = 0.01
MAX_DRAFT = 10
ROUNDS = 9  # of bisection
MOST_OWED, MOST_DECODES = 256, 1024
# Columns of a prompt that is owed, and of a decode.
DUE, WORK, PROMPT, OUTPUT, PACE, BEGUN, OWNER = range(7)
CONTEXT, LEFT, LEAD, DECODE_PACE = range(4)
Floats = NDArray[np.float64]


class Engine(NamedTuple):
    """What an engine does in a second.

    Attributes:
        fixed_s: of a batch, draft steps counted in.
        token_s: of an output token, what of it the batch's tokens cost.
        context_s: of an output token and token of its context.
        tokens_each: output tokens that one verification brings on average.
        kv_tokens: room.
    """

    fixed_s: float
    token_s: float
    context_s: float
    tokens_each: float
    kv_tokens: float


@njit(cache=True)
def advance(engine: Engine, owed: Floats, num_owed: int, decodes: Floats, num_decodes: int) -> tuple[int, int]:
    """One slice of time: decodes that are not ahead, then prompts by deadline, then decodes that run ahead.

    Args:
        engine: speed and room.
        owed: float64 [n, 7], prompts in order of deadline; changed.
        num_owed: of them.
        decodes: float64 [m, 4]; changed.
        num_decodes: of them.

    Returns:
        How many prompts and decodes there are at the slice's end.
    """
    left_s, tightest_s, used = SLICE_S, np.inf, 0.0
    for i in range(num_decodes):
        used += decodes[i, CONTEXT]
        decodes[i, LEAD] -= SLICE_S / decodes[i, DECODE_PACE]
        due = min(max(-decodes[i, LEAD], 0.0), decodes[i, LEFT])
        if due > 0.0:
            tightest_s = min(tightest_s, decodes[i, DECODE_PACE])
        left_s -= due * (engine.token_s + engine.context_s * decodes[i, CONTEXT])
        decodes[i, LEAD] += due
        decodes[i, LEFT] -= due
        decodes[i, CONTEXT] += due
    fixed_s = SLICE_S * min(engine.fixed_s / (tightest_s * engine.tokens_each), 1.0)
    left_s -= fixed_s
    for j in range(num_owed):
        used += owed[j, PROMPT] * owed[j, BEGUN]
    waits = False
    while num_owed > 0 and left_s > 0.0 and not waits:
        if owed[0, BEGUN] == 0.0 and used + owed[0, PROMPT] > engine.kv_tokens:
            waits = True
            continue
        used += owed[0, PROMPT] * (1.0 - owed[0, BEGUN])
        owed[0, BEGUN] = 1.0
        done = min(owed[0, WORK], left_s)
        left_s -= done
        owed[0, WORK] -= done
        if owed[0, WORK] <= 0.0:
            decodes[num_decodes, CONTEXT] = owed[0, PROMPT]
            decodes[num_decodes, LEFT] = owed[0, OUTPUT] - 1.0
            decodes[num_decodes, LEAD] = 0.0
            decodes[num_decodes, DECODE_PACE] = owed[0, PACE]
            num_decodes += 1
            owed[: num_owed - 1] = owed[1:num_owed].copy()
            num_owed -= 1
    if left_s > 0.0 and num_decodes > 0:
        # Batches of decodes alone follow each other without a pause, so their fixed cost is counted here instead.
        left_s += fixed_s
        batch_s = engine.fixed_s
        for i in range(num_decodes):
            batch_s += engine.tokens_each * (engine.token_s + engine.context_s * decodes[i, CONTEXT])
        for i in range(num_decodes):
            ahead = min(left_s / batch_s * engine.tokens_each, decodes[i, LEFT])
            decodes[i, LEAD] += ahead
            decodes[i, LEFT] -= ahead
            decodes[i, CONTEXT] += ahead
    i = 0
    while i < num_decodes:
        if decodes[i, LEFT] <= 0.0:
            num_decodes -= 1
            decodes[i] = decodes[num_decodes]
        else:
            i += 1
    return num_owed, num_decodes


@njit(cache=True)
def keeps_all(engine: Engine, now_s: float, owed: Floats, num_owed: int, decodes: Floats, num_decodes: int) -> bool:
    """Whether every prompt ends by its deadline when nobody else comes."""
    owed, decodes = owed.copy(), decodes.copy()
    while num_owed > 0:
        now_s += SLICE_S
        for j in range(num_owed):
            if owed[j, DUE] < now_s - SLICE_S:
                return False
        num_owed, num_decodes = advance(engine, owed, num_owed, decodes, num_decodes)
    return True


@njit(cache=True)
def insert(owed: Floats, num_owed: int, prompt: Floats) -> None:
    """Put one prompt behind those that are due no later."""
    at = 0
    while at < num_owed and owed[at, DUE] <= prompt[DUE]:
        at += 1
    for j in range(num_owed, at, -1):
        owed[j] = owed[j - 1]
    owed[at] = prompt


@njit(cache=True)
def remove(owed: Floats, num_owed: int, at: int) -> None:
    """Take one prompt out."""
    for j in range(at, num_owed - 1):
        owed[j] = owed[j + 1]


@njit(cache=True)
def place(
    engine: Engine, now_s: float, owed: Floats, num_owed: int, decodes: Floats, num_decodes: int, prompt: Floats
) -> tuple[bool, int]:
    """Whether the prompt can be promised beside all others, or else in whose place; -1 in nobody's."""
    trial = owed.copy()
    insert(trial, num_owed, prompt)
    if keeps_all(engine, now_s, trial, num_owed + 1, decodes, num_decodes):
        return True, -1
    costliest = -1
    for j in range(num_owed):
        if owed[j, BEGUN] == 0.0 and owed[j, WORK] > max(
            prompt[WORK], owed[costliest, WORK] if costliest >= 0 else 0.0
        ):
            costliest = j
    if costliest >= 0:
        trial[:] = owed
        remove(trial, num_owed, costliest)
        insert(trial, num_owed - 1, prompt)
        if keeps_all(engine, now_s, trial, num_owed, decodes, num_decodes):
            return False, costliest
    return False, -1


@njit(cache=True)
def serve(engine: Engine, replicas: int, prompts: Floats, arrivals: Floats, selective: bool) -> NDArray[np.bool_]:
    """bool [N]: who is promised and keeps it. ``prompts`` float64 [N, 7] in order of arrival."""
    count = len(prompts)
    owed, decodes = np.zeros((replicas, MOST_OWED, 7)), np.zeros((replicas, MOST_DECODES, 4))
    num_owed, num_decodes = np.zeros(replicas, dtype=np.int64), np.zeros(replicas, dtype=np.int64)
    promised = np.zeros(count, dtype=np.bool_)
    slice_now = 0
    for i in range(count):
        while slice_now * SLICE_S < arrivals[i]:
            slice_now += 1
            for k in range(replicas):
                if num_owed[k] + num_decodes[k] > 0:
                    num_owed[k], num_decodes[k] = advance(engine, owed[k], num_owed[k], decodes[k], num_decodes[k])
        now_s = slice_now * SLICE_S
        instead, whose = -1, -1
        for k in np.argsort(num_decodes + 1000 * num_owed):
            if num_owed[k] + 1 >= MOST_OWED or num_owed[k] + num_decodes[k] + 1 >= MOST_DECODES:
                continue
            fits, victim = place(engine, now_s, owed[k], num_owed[k], decodes[k], num_decodes[k], prompts[i])
            if fits:
                promised[i] = True
                insert(owed[k], num_owed[k], prompts[i])
                num_owed[k] += 1
                break
            if victim >= 0 and instead < 0:
                instead, whose = k, victim
        if selective and not promised[i] and instead >= 0:
            promised[int(owed[instead, whose, OWNER])] = False
            promised[i] = True
            remove(owed[instead], num_owed[instead], whose)
            insert(owed[instead], num_owed[instead] - 1, prompts[i])
    return promised


@dataclass(frozen=True)
class Case:
    """One search."""

    scenario: str
    selective: bool
    replicas: int
    requests: int
    seeds: int
    arrivals: str
    drafter: str
    acceptance: float
    margin: float
    profile: str = PROFILE


def promised_share(case: Case, draft: int, rate_rps: float, seed: int) -> float:
    """Share of the requests in the middle of one run that are promised and kept."""
    profile = with_drafter(find_profile(case.profile), case.drafter)
    made = make_workload(case.scenario, rate_rps, case.requests, seed, case.arrivals, case.acceptance)
    calls = made.bound(profile.model).calls
    cached = cached_at_best(made.prefixes, calls["prompt_tokens"], 1).astype(np.float64)
    if np.any(calls["next_call"] >= 0):
        raise SystemExit(f"{case.scenario}: one call a request is what this benchmark can do; {', '.join(SCENARIOS)}")
    k_c, b_c, _, _, k_ctx, k_q, k_seq, k_s = profile.model.coefficients * (1.0 + case.margin)
    each = sum(case.acceptance**k for k in range(draft + 1))
    tokens = (draft + 1) / each
    room = float(limits_of(profile).kv_capacity_tokens)
    engine = Engine(b_c + draft * k_s, k_c * tokens + k_seq / each, k_ctx / each, each, room)
    prompts = np.zeros((len(calls), 7))
    length = calls["prompt_tokens"].astype(np.float64)
    prompts[:, DUE] = calls["arrival_s"] + calls["ttft_s"]
    prompts[:, WORK] = k_c * (length - cached) + k_q * (length**2 - cached**2)
    prompts[:, PROMPT], prompts[:, OUTPUT] = length, calls["output_tokens"]
    # A request of two stages is as fast as the tighter one.
    prompts[:, PACE] = np.minimum(calls["tpot_s"], calls["next_tpot_s"])
    prompts[:, OWNER] = np.arange(len(calls))
    kept = serve(engine, case.replicas, prompts, calls["arrival_s"].astype(np.float64), case.selective)
    return float(kept[int(0.1 * len(kept)) : int(0.95 * len(kept))].mean())


def search(case: Case) -> dict[str, Any]:
    """Highest rate a GPU, mean over the seeds, each at the best draft length."""
    profile = with_drafter(find_profile(case.profile), case.drafter)
    drafts = range(MAX_DRAFT + 1) if case.drafter != NO_DRAFTER else range(1)
    sample = make_workload(case.scenario, 1.0, 20_000, 0, "poisson", case.acceptance).bound(profile.model)
    acceptance = case.acceptance if case.drafter != NO_DRAFTER else None
    bound = fluid_bound(work_of(sample), profile.model, limits_of(profile), acceptance, profile.model.k_s_s) / TARGET
    rates = []
    for seed in table_seeds(case.seeds):
        best = 0.0
        for draft in drafts:
            if best and promised_share(case, draft, best * case.replicas * bound, seed) < TARGET:
                continue  # no better than another length
            low, high = best, 2.0
            for _ in range(ROUNDS):
                middle = 0.5 * (low + high)
                attains = promised_share(case, draft, middle * case.replicas * bound, seed) >= TARGET
                low, high = (middle, high) if attains else (low, middle)
            best = low
        rates.append(best * bound)
    rate = float(np.mean(rates))
    return {
        "scenario": case.scenario,
        "promises": "instead of costlier" if case.selective else "first come",
        "capacity_rps_per_gpu": rate,
        "share": rate / bound,
        "by_seed": rates,
    }


def main() -> None:
    """Print a row for each scenario and rule, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000, help="of one replica")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--arrivals", default="poisson")
    parser.add_argument("--profile", default=PROFILE)
    parser.add_argument("--drafter", choices=DRAFTERS, default=NO_DRAFTER)
    parser.add_argument("--acceptance", type=float, default=0.7)
    parser.add_argument("--margin", type=float, default=0.0, help="share by which the engine is slower than its model")
    given = parser.parse_args()
    requests = given.requests * given.replicas
    more = (given.replicas, requests, given.seeds, given.arrivals, given.drafter, given.acceptance, given.margin,
            given.profile)  # fmt: skip
    cases = [Case(name, rule, *more) for name in given.scenario or SCENARIOS for rule in (False, True)]
    rows = []
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(search, cases):
            print(
                f"{row['scenario']:14} {row['promises']:20} {row['capacity_rps_per_gpu']:.3g}/s {row['share']:.3f}",
                flush=True,
            )
            rows.append(row)
    margin = f"-{given.margin:g}" if given.margin else ""
    engine = "" if given.profile == PROFILE else f"-{given.profile}"
    name = f"ideal-{given.replicas}-{given.arrivals}-{given.drafter}{engine}{margin}.json"
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / name).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
