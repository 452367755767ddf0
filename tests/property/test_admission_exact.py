"""Algorithm 1 against brute force over all subsets, jitted and as plain Python, and against one without bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit

from slos_serve.perf.step_time import per_token_s
from slos_serve.planning.algorithm1 import EXACT, INFEASIBLE, STOPPED, Admitted, admit
from slos_serve.planning.demand import Demand
from slos_serve.planning.feasible import first_missed, fits
from slos_serve.planning.supply import Supply, rate_beside
from tests.builders import OPT_13B_A100

PROJECT = Path(__file__).resolve().parents[2]
COUNT = 2000
MOST_REQUESTS = 12
EVERY_STATE = 4_000_000


def instance(rng: np.random.Generator, most_requests: int) -> tuple[Demand, Supply]:
    """A demand and a supply.

    Tight and loose in time and memory, with and without drafts and lent time, with equal weights and others.
    """
    n, tiers, moments = int(rng.integers(1, most_requests + 1)), 3, int(rng.integers(1, 4))
    due_s = np.sort(100.0 + rng.random(n) * float(rng.choice([0.5, 3.0])))
    drafts = rng.integers(0, 5, tiers) if rng.random() < 0.5 else np.zeros(tiers, dtype=np.int64)
    accepted = (1.0 - 0.7 ** (drafts + 1)) / 0.3
    blocks = rng.integers(1, 50, (n, moments)).astype(np.float64)
    room = float(rng.uniform(0.2, 1.3)) * blocks.sum(axis=0) if rng.random() < 0.5 else blocks.sum(axis=0) + 1.0
    promised = rng.random(n) < 0.15
    demand = Demand(
        slots=np.arange(n),
        due_s=due_s,
        tokens=rng.integers(20, 3000, n).astype(np.float64),
        tier=rng.integers(0, tiers, n),
        blocks=blocks,
        weight=rng.choice([0.5, 1.0, 2.0], n) if rng.random() < 0.5 else np.ones(n),
        promised=promised,
        needs_seat=np.where(promised & (rng.random(n) < 0.5), 0.0, 1.0),
    )
    seats = np.sort(rng.uniform(0.0, 0.8 * n, 4)) if rng.random() < 0.3 else np.full(4, float(n))
    lent = np.cumsum(rng.integers(0, 300, 4)).astype(np.float64) if rng.random() < 0.5 else np.zeros(4)
    supply = Supply(
        coefficients=OPT_13B_A100.coefficients,
        max_tokens=2048.0,
        draft_s=0.7e-3 * float(drafts.max()),
        start_s=100.0,
        counts=rng.integers(0, 60, tiers).astype(np.float64),
        periods_s=np.array([0.05, 0.1, 0.15]) * accepted,
        tokens_each=np.asarray(1.0 + drafts, dtype=np.float64),
        extra_s_each=rng.random(tiers) * 2e-4,
        blocks=np.round(room),
        moments_s=100.0 + np.array([0.0, 0.2, 1.0, 3.0]),
        lent_tokens=lent - lent[0],
        seats=seats,
    )
    return demand, supply


@njit(cache=True)
def brute_force(demand: Demand, supply: Supply) -> tuple[float, float]:
    """Best (weight, remaining budget) over all subsets that hold the promised; weight -1 when none is feasible."""
    n, best, left = len(demand.due_s), -1.0, 0.0
    taken = np.zeros(n, dtype=np.bool_)
    for mask in range(1 << n):
        value, allowed = 0.0, True
        for i in range(n):
            taken[i] = (mask >> i) & 1 == 1
            allowed = allowed and (taken[i] or not demand.promised[i])
            value += demand.weight[i] if taken[i] else 0.0
        if not allowed or value < best - 1e-9 or not fits(taken, demand, supply):
            continue
        budget = first_missed(taken, demand, supply)[1]
        if value > best + 1e-9 or budget > left:
            best, left = value, budget
    return best, left


State = tuple[float, float, Any]


def labels_only(demand: Demand, supply: Supply) -> tuple[float, float] | None:
    """The same program with nothing but dominance: what the bounds and the greedy set may not change."""
    tiers = len(supply.counts)
    states: dict[tuple[int, ...], list[State]] = {(0,) * (tiers + 1): [(0.0, 0.0, np.zeros(len(supply.blocks)))]}
    last_s, last_lent = supply.start_s, 0.0
    lent = np.interp(demand.due_s, supply.moments_s, supply.lent_tokens)
    start_by_s = demand.due_s - demand.tokens * per_token_s(supply.coefficients)
    seats = np.interp(start_by_s, supply.moments_s, supply.seats)
    for i in range(len(demand.due_s)):
        kept: dict[tuple[int, ...], list[State]] = {}
        for key, those in states.items():  # decodes by tier, then how many took a seat
            rate = rate_beside(supply.counts + np.array(key[:tiers]), supply)
            started = key[tiers] + int(demand.needs_seat[i])
            after = (*(c + (level == demand.tier[i]) for level, c in enumerate(key[:tiers])), started)
            feasible = min(rate, rate_beside(supply.counts + np.array(after[:tiers]), supply)) >= 0.0
            feasible = feasible and (demand.needs_seat[i] == 0.0 or started <= seats[i] + 1e-6)
            for value, before, used in those:
                budget = before + rate * (demand.due_s[i] - last_s) + lent[i] - last_lent
                if not demand.promised[i]:
                    _keep(kept, key, (value, budget, used))
                more = used + demand.blocks[i]
                if feasible and budget - demand.tokens[i] >= -1e-6 and (more <= supply.blocks + 1e-6).all():
                    _keep(kept, after, (value + demand.weight[i], budget - demand.tokens[i], more))
        states, last_s, last_lent = kept, demand.due_s[i], lent[i]
    ends = [(round(value, 9), budget) for those in states.values() for value, budget, _ in those]
    return max(ends, default=None)


def _keep(kept: dict[tuple[int, ...], list[State]], key: tuple[int, ...], new: State) -> None:
    those = kept.setdefault(key, [])
    if any(value >= new[0] and budget >= new[1] and (used <= new[2]).all() for value, budget, used in those):
        return
    worse = [(old[0] <= new[0] and old[1] <= new[1] and (old[2] >= new[2]).all()) for old in those]
    those[:] = [old for old, is_worse in zip(those, worse, strict=True) if not is_worse]
    those.append(new)


def answers(seed: int, count: int) -> list[Admitted]:
    """What ``admit`` says to ``count`` random instances."""
    rng = np.random.default_rng(seed)
    return [admit(*instance(rng, MOST_REQUESTS), EVERY_STATE) for _ in range(count)]


def test_value_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    outcomes = {"all": 0, "infeasible": 0, "drops": 0}
    for found in answers(0, COUNT):
        demand, supply = instance(rng, MOST_REQUESTS)
        best, left = brute_force(demand, supply)
        if best < 0.0:
            assert found.status == INFEASIBLE
            outcomes["infeasible"] += 1
            continue
        assert found.status == EXACT
        assert found.value == pytest.approx(best)
        assert found.budget == pytest.approx(left, abs=1e-3)
        assert found.value == pytest.approx(float(demand.weight[found.taken].sum()))
        outcomes["all" if found.taken.all() else "drops"] += 1
    assert min(outcomes.values()) > COUNT // 20, outcomes


def test_plain_python_agrees_with_the_kernel(tmp_path: Path) -> None:
    count = COUNT // 10
    taken, *numbers = zip(*answers(0, count), strict=True)
    np.savez(tmp_path / "kernel.npz", taken=np.concatenate(taken), numbers=np.array(numbers))
    code = (
        "import sys, numpy as np\n"
        "from tests.property.test_admission_exact import COUNT, answers\n"
        "from slos_serve.planning import algorithm1\n"
        "assert not hasattr(algorithm1.admit, 'py_func')\n"
        "taken, *numbers = zip(*answers(0, COUNT // 10))\n"
        "kernel = np.load(sys.argv[1])\n"
        "assert (np.concatenate(taken) == kernel['taken']).all()\n"
        "assert np.allclose(np.array(numbers), kernel['numbers'])\n"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "kernel.npz")],
        check=False,
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_bounds_change_no_verdict() -> None:
    rng = np.random.default_rng(2)
    drops = 0
    for _ in range(60):
        demand, supply = instance(rng, 22)
        found = admit(demand, supply, EVERY_STATE)
        best = labels_only(demand, supply)
        if best is None:
            assert found.status == INFEASIBLE
            continue
        assert found.status == EXACT
        assert found.value == pytest.approx(best[0])
        assert found.budget == pytest.approx(best[1], abs=1e-3)
        drops += found.value < demand.weight.sum()
    assert drops > 15


@pytest.mark.parametrize("most_work", [0, 20, 300])
def test_too_much_work_leaves_a_feasible_answer_no_worse_than_the_greedy_one(most_work: int) -> None:
    rng = np.random.default_rng(3)
    seen = 0
    for _ in range(200):
        demand, supply = instance(rng, 30)
        found = admit(demand, supply, most_work)
        if found.status == INFEASIBLE:
            continue
        seen += found.status == STOPPED
        assert not (demand.promised & ~found.taken).any()
        assert fits(found.taken, demand, supply)
        assert found.value >= admit(demand, supply, 0).value - 1e-9
    assert seen > 10
