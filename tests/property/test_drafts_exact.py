"""The pruned enumeration of draft lengths against all of them, jitted and as plain Python."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.perf.formula import K_S
from slos_serve.planning.speculation import best_drafts, rate_of, table_of_lengths, tokens_each_verification
from slos_serve.planning.supply import prefill_rate
from slos_serve.planning.tiers import Tiers
from tests.builders import OPT_13B_A100

PROJECT = Path(__file__).resolve().parents[2]
LONGEST = 10
# Splatted arguments: mypy cannot count them.
choose: Any = best_drafts


def tiers_with(extra_s: np.ndarray, acceptance: np.ndarray) -> Tiers:
    """Tiers of which only the seconds and the acceptance count."""
    none = np.zeros(len(extra_s))
    return Tiers(none, none, none, none, none, extra_s, acceptance)


def instance(rng: np.random.Generator, tiers: int, longest: int) -> tuple[Any, ...]:
    """Counts, the table of lengths, coefficients and token limit; light and heavy, with and without a cost."""
    counts = rng.integers(0, 80, tiers).astype(np.float64) * (rng.random(tiers) < 0.8)
    pace_s = np.sort(rng.choice([0.03, 0.05, 0.075, 0.1, 0.15, 0.3], tiers, replace=False)) * 0.95
    extra_s = rng.random(tiers) * 2e-3
    acceptance = rng.choice([0.0, 0.11, 0.4, 0.7, 0.9, 0.99], tiers)
    longest_step_s, draft_s_each = float(rng.choice([0.0, 0.14, 60.0])), float(rng.choice([0.0, 5e-4]))
    table = table_of_lengths(pace_s, tiers_with(extra_s, acceptance), longest, longest_step_s, draft_s_each)
    coefficients = OPT_13B_A100.coefficients
    coefficients[K_S] = rng.choice([0.0, 1e-4, 1e-3, 5e-3])
    return counts, table, coefficients, float(rng.choice([64.0, 2048.0, 16384.0]))


def brute_force(arguments: tuple[Any, ...], longest: int) -> float:
    """Largest rate over every combination of lengths."""
    counts = arguments[0]
    return max(
        rate_of(np.array(drafts), *arguments) for drafts in itertools.product(range(longest + 1), repeat=len(counts))
    )


def check(seed: int, count: int, longest: int) -> None:
    """Compare ``count`` random instances."""
    rng = np.random.default_rng(seed)
    speculates, kept_off, computed_in_all, possible = 0, 0, 0, 0
    for _ in range(count):
        tiers = int(rng.integers(1, 4))
        arguments = instance(rng, tiers, longest)
        present = rng.integers(0, longest + 1, tiers)
        drafts, rate, computed = choose(*arguments, present, 0.0)
        assert rate == pytest.approx(brute_force(arguments, longest), rel=1e-12, abs=1e-9)
        assert rate == rate_of(drafts, *arguments)
        assert rate >= rate_of(np.zeros(tiers, dtype=np.int64), *arguments)
        speculates += bool(drafts.any())
        kept_off += not drafts.any()
        computed_in_all += computed
        possible += (longest + 1) ** tiers
    assert speculates > 0 and kept_off > 0
    assert computed_in_all < possible


def test_pruned_enumeration_equals_all_combinations() -> None:
    check(seed=0, count=60, longest=LONGEST)


def test_plain_python_agrees_with_the_kernel() -> None:
    code = (
        "from tests.property.test_drafts_exact import check\n"
        "from slos_serve.planning import speculation\n"
        "assert not hasattr(speculation.best_drafts, 'py_func')\n"
        "check(seed=1, count=20, longest=4)\n"
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


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_present_lengths_stay_unless_others_are_better_by_more_than_the_hysteresis(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiers = int(rng.integers(1, 4))
    arguments = instance(rng, tiers, 6)
    present = rng.integers(0, 7, tiers) * (arguments[0] > 0.0)
    hysteresis = float(rng.choice([1.0, 50.0, 500.0]))
    drafts, rate, _ = choose(*arguments, present, hysteresis)
    now, best = rate_of(present, *arguments), brute_force(arguments, 6)
    if best <= now + hysteresis:
        assert drafts.tolist() == present.tolist()
    else:
        assert rate == pytest.approx(best)


@given(acceptance=st.floats(0.0, 0.99), draft=st.integers(0, 10))
def test_tokens_of_a_verification_follow_the_formula(acceptance: float, draft: int) -> None:
    expected = (1.0 - acceptance ** (draft + 1)) / (1.0 - acceptance)
    assert tokens_each_verification(acceptance, draft) == pytest.approx(expected)


def test_unbounded_batches_have_the_rate_of_the_design() -> None:
    """A batch as long as a verification lasts, with one verification of every decode in it."""
    counts, pace_s, extra_s = np.array([40.0]), np.array([0.095]), np.array([1e-3])
    coefficients = OPT_13B_A100.coefficients
    coefficients[K_S] = 1e-3
    table = table_of_lengths(pace_s, tiers_with(extra_s, np.array([0.7])), 4, 60.0, 2e-4)
    mean = tokens_each_verification(0.7, 4)
    direct = prefill_rate(counts, pace_s * mean, np.array([5.0]), extra_s + 8e-4, 4e-3, coefficients, 16384.0)
    assert rate_of(np.array([4]), counts, table, coefficients, 16384.0) == pytest.approx(direct)
