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

from slos_serve.planning.admission_kernel import EXACT, GREEDY, INFEASIBLE, admit
from slos_serve.planning.greedy_set import first_violation
from slos_serve.planning.prefill_rate import prefill_rate
from tests.builders import OPT_13B_A100

PROJECT = Path(__file__).resolve().parents[2]
COUNT = 2000
MOST_REQUESTS = 12
Arguments = tuple[Any, ...]
Instance = tuple[Arguments, Any]

# Splatted arguments: mypy cannot count them.
call: Any = admit


def instance(rng: np.random.Generator, most_requests: int) -> Instance:
    """Arguments of ``admit`` (without the label limit) and the KV room.

    Tight and loose in time and memory, with and without drafts, with equal weights and others.
    """
    n, tiers, checkpoints = int(rng.integers(1, most_requests + 1)), 3, int(rng.integers(1, 4))
    due_s = np.sort(100.0 + rng.random(n) * float(rng.choice([0.5, 3.0])))
    drafts = rng.integers(0, 5, tiers) if rng.random() < 0.5 else np.zeros(tiers, dtype=np.int64)
    accepted = (1.0 - 0.7 ** (drafts + 1)) / 0.3
    memory = rng.integers(1, 50, (n, checkpoints)).astype(np.float64)
    room = float(rng.uniform(0.2, 1.3)) * memory.sum(axis=0) if rng.random() < 0.5 else memory.sum(axis=0) + 1.0
    return (
        due_s,
        rng.integers(20, 3000, n).astype(np.float64),
        rng.integers(0, tiers, n),
        memory,
        rng.choice([0.5, 1.0, 2.0], n) if rng.random() < 0.5 else np.ones(n),
        rng.random(n) < 0.15,
        rng.integers(0, 60, tiers).astype(np.float64),
        np.array([0.05, 0.1, 0.15]) * accepted,
        1.0 + drafts,
        rng.random(tiers) * 2e-4,
        0.7e-3 * float(drafts.max()),
        OPT_13B_A100.coefficients,
        2048.0,
        100.0,
    ), np.round(room)


@njit(cache=True)
def brute_force(
    due_s: Any,
    cost: Any,
    tier: Any,
    memory: Any,
    weight: Any,
    must: Any,
    counts: Any,
    periods_s: Any,
    each: Any,
    extra_s: Any,
    draft_s: float,
    coefficients: Any,
    most: float,
    start_s: float,
    room: Any,
) -> tuple[float, float]:
    """Best (weight, remaining budget) over all subsets that hold the musts; weight -1 when none is feasible."""
    n, best, left = len(due_s), -1.0, 0.0
    taken = np.zeros(n, dtype=np.bool_)
    for mask in range(1 << n):
        value, fits = 0.0, True
        for i in range(n):
            taken[i] = (mask >> i) & 1 == 1
            fits = fits and (taken[i] or not must[i])
            value += weight[i] if taken[i] else 0.0
        if not fits or value < best - 1e-9:
            continue
        for k in range(len(room)):
            fits = fits and memory[taken, k].sum() <= room[k] + 1e-6
        if not fits:
            continue
        at, budget = first_violation(
            taken, due_s, cost, tier, counts, periods_s, each, extra_s, draft_s, coefficients, most, start_s
        )
        if at < 0 and (value > best + 1e-9 or budget > left):
            best, left = value, budget
    return best, left


every_subset: Any = brute_force


def labels_only(arguments: Arguments, room: Any) -> tuple[float, float] | None:
    """The same program with nothing but dominance: what the bounds and the greedy pass may not change."""
    due_s, cost, tier, memory, weight, must, counts, *model, start_s = arguments
    labels: dict[tuple[int, ...], list[tuple[Any, ...]]] = {(0,) * len(counts): [(0.0, 0.0, np.zeros(len(room)))]}
    rates: dict[tuple[int, ...], float] = {}
    last_s = start_s
    for i in range(len(due_s)):
        kept: dict[tuple[int, ...], list[tuple[Any, ...]]] = {}
        for key, those in labels.items():
            if key not in rates:
                rates[key] = prefill_rate(counts + np.array(key), *model)
            for value, before, used in those:
                budget = before + rates[key] * (due_s[i] - last_s)
                if not must[i]:
                    _keep(kept, key, (value, budget, used))
                after = tuple(c + (level == tier[i]) for level, c in enumerate(key))
                if after not in rates:
                    rates[after] = prefill_rate(counts + np.array(after), *model)
                fits = min(rates[key], rates[after]) >= 0.0 and budget - cost[i] >= -1e-6
                if fits and (used + memory[i] <= room + 1e-6).all():
                    _keep(kept, after, (value + weight[i], budget - cost[i], used + memory[i]))
        labels, last_s = kept, due_s[i]
    ends = [(round(value, 9), budget) for those in labels.values() for value, budget, _ in those]
    return max(ends, default=None)


def _keep(kept: dict[tuple[int, ...], list[tuple[Any, ...]]], key: tuple[int, ...], new: tuple[Any, ...]) -> None:
    those = kept.setdefault(key, [])
    if any(value >= new[0] and budget >= new[1] and (used <= new[2]).all() for value, budget, used in those):
        return
    worse = [(old[0] <= new[0] and old[1] <= new[1] and (old[2] >= new[2]).all()) for old in those]
    those[:] = [old for old, is_worse in zip(those, worse, strict=True) if not is_worse]
    those.append(new)


def answers(seed: int, count: int) -> list[tuple[Any, float, float, int]]:
    """What ``admit`` says to ``count`` random instances: set, value, remaining budget, status."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        arguments, room = instance(rng, MOST_REQUESTS)
        found.append(call(*arguments, room, 200_000)[:4])
    return found


def test_value_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    outcomes = {"all": 0, "infeasible": 0, "drops": 0}
    for taken, value, budget, status in answers(0, COUNT):
        arguments, room = instance(rng, MOST_REQUESTS)
        best, left = every_subset(*arguments, room)
        if best < 0.0:
            assert status == INFEASIBLE
            outcomes["infeasible"] += 1
            continue
        assert status == EXACT
        assert value == pytest.approx(best)
        assert budget == pytest.approx(left, abs=1e-3)
        assert value == pytest.approx(float(arguments[4][taken].sum()))
        outcomes["all" if taken.all() else "drops"] += 1
    assert min(outcomes.values()) > COUNT // 20, outcomes


def test_plain_python_agrees_with_the_kernel(tmp_path: Path) -> None:
    taken, *numbers = zip(*answers(0, COUNT), strict=True)
    np.savez(tmp_path / "kernel.npz", taken=np.concatenate(taken), numbers=np.array(numbers))
    code = (
        "import sys, numpy as np\n"
        "from tests.property.test_admission_exact import COUNT, answers\n"
        "from slos_serve.planning import admission_kernel\n"
        "assert not hasattr(admission_kernel.admit, 'py_func')\n"
        "taken, *numbers = zip(*answers(0, COUNT))\n"
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
        arguments, room = instance(rng, 22)
        _, value, budget, status, _ = call(*arguments, room, 1_000_000)
        best = labels_only(arguments, room)
        if best is None:
            assert status == INFEASIBLE
            continue
        assert status == EXACT
        assert (value, budget) == (pytest.approx(best[0]), pytest.approx(best[1], abs=1e-3))
        drops += value < arguments[4].sum()
    assert drops > 15


def test_too_many_labels_leave_a_feasible_answer() -> None:
    rng = np.random.default_rng(3)
    seen = 0
    for _ in range(200):
        arguments, room = instance(rng, 30)
        taken, _, _, status, labels = call(*arguments, room, 3)
        assert labels <= 3
        if status == INFEASIBLE:
            continue
        seen += status == GREEDY
        due_s, cost, tier, memory, _, must, *rest = arguments
        assert not (must & ~taken).any()
        assert (memory[taken].sum(axis=0) <= room + 1e-6).all()
        assert first_violation(taken, due_s, cost, tier, *rest)[0] < 0
    assert seen > 10
