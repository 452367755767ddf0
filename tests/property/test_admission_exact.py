"""Algorithm 1 against brute force over all subsets, jitted and as plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slos_serve.planning.admission_kernel import EXACT, INFEASIBLE, admit, first_violation
from tests.builders import OPT_13B_A100

PROJECT = Path(__file__).resolve().parents[2]
Instance = tuple[tuple[Any, ...], Any]


# Splatted arguments: mypy cannot count them.
call: Any = admit


def instance(rng: np.random.Generator, most_requests: int) -> Instance:
    """Arguments of ``admit`` (without the label limit) and the KV room; tight and loose in every respect."""
    n, tiers, checkpoints = int(rng.integers(1, most_requests + 1)), 3, int(rng.integers(1, 4))
    due_s = np.sort(100.0 + rng.random(n) * float(rng.choice([0.5, 3.0])))
    return (
        due_s,
        rng.integers(20, 3000, n).astype(np.float64),
        rng.integers(0, tiers, n),
        rng.integers(1, 50, (n, checkpoints)).astype(np.float64),
        rng.choice([0.5, 1.0, 2.0], n) if rng.random() < 0.5 else np.ones(n),
        rng.random(n) < 0.15,
        rng.integers(0, 60, tiers).astype(np.float64),
        np.array([0.05, 0.1, 0.15]),
        np.ones(tiers),
        rng.random(tiers) * 2e-4,
        0.0,
        OPT_13B_A100.coefficients,
        2048.0,
        100.0,
    ), rng.integers(20, 400, checkpoints).astype(np.float64)


def brute_force(arguments: tuple[Any, ...], room: Any) -> tuple[float, float] | None:
    """Best (weight, remaining budget) over all subsets that hold the musts; ``None`` when none is feasible."""
    due_s, cost, tier, memory, weight, must, *rest = arguments
    best: tuple[float, float] | None = None
    for mask in range(1 << len(due_s)):
        taken = np.array([(mask >> i) & 1 for i in range(len(due_s))], dtype=np.bool_)
        if (must & ~taken).any() or (memory[taken].sum(axis=0) > room + 1e-6).any():
            continue
        at, budget = first_violation(taken, due_s, cost, tier, *rest)
        if at >= 0:
            continue
        worth = (round(float(weight[taken].sum()), 9), float(budget))
        if best is None or worth > best:
            best = worth
    return best


def check(seed: int, count: int, most_requests: int) -> None:
    """Compare ``count`` random instances."""
    rng = np.random.default_rng(seed)
    outcomes = {"admits": 0, "infeasible": 0, "drops": 0}
    for _ in range(count):
        arguments, room = instance(rng, most_requests)
        taken, value, budget, status, _ = call(*arguments, room, 200_000)
        best = brute_force(arguments, room)
        if best is None:
            assert status == INFEASIBLE
            outcomes["infeasible"] += 1
            continue
        assert status == EXACT
        assert value == pytest.approx(best[0])
        assert budget == pytest.approx(best[1], abs=1e-3)
        assert value == pytest.approx(float(arguments[4][taken].sum()))
        outcomes["admits" if taken.all() else "drops"] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_value_equals_brute_force() -> None:
    check(seed=0, count=300, most_requests=9)


def test_plain_python_agrees_with_the_kernel() -> None:
    code = (
        "from tests.property.test_admission_exact import check\n"
        "from slos_serve.planning import admission_kernel\n"
        "assert not hasattr(admission_kernel.admit, 'py_func')\n"
        "check(seed=1, count=30, most_requests=6)\n"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_too_many_labels_leave_a_feasible_answer() -> None:
    rng = np.random.default_rng(3)
    seen = 0
    for _ in range(60):
        arguments, room = instance(rng, 12)
        taken, _, _, status, labels = call(*arguments, room, 3)
        assert labels <= 3
        if status == INFEASIBLE:
            continue
        seen += 1
        due_s, cost, tier, memory, _, must, *rest = arguments
        assert not (must & ~taken).any()
        assert (memory[taken].sum(axis=0) <= room + 1e-6).all()
        assert first_violation(taken, due_s, cost, tier, *rest)[0] < 0
    assert seen > 10
