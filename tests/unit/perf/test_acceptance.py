"""What is learnt about drafts."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.perf.acceptance import HALF_LIFE_DRAFTS, PRIOR_MEAN, AcceptanceEstimate


def verifications(rng: np.random.Generator, acceptance: float, draft: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Drafted and accepted tokens of ``count`` verifications of a geometric process."""
    right = rng.random((count, draft)) < acceptance
    return np.full(count, draft), np.cumprod(right, axis=1).sum(axis=1)


@pytest.mark.parametrize("acceptance", [0.11, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("draft", [1, 4, 10])
def test_the_mean_of_a_geometric_process_is_found_whatever_the_length(acceptance: float, draft: int) -> None:
    estimate = AcceptanceEstimate(2)
    drafted, accepted = verifications(np.random.default_rng(0), acceptance, draft, 4000)
    for part in range(0, 4000, 100):
        chosen = slice(part, part + 100)
        estimate.observe(np.ones(100, dtype=np.int64), drafted[chosen], accepted[chosen])
    assert estimate.mean()[1] == pytest.approx(acceptance, abs=0.03)
    assert estimate.mean()[0] == pytest.approx(PRIOR_MEAN)


def test_the_bound_rises_to_the_mean_as_verifications_come() -> None:
    rng = np.random.default_rng(1)
    estimate = AcceptanceEstimate(1)
    gaps = [float(estimate.mean()[0] - estimate.lower()[0])]
    for _ in range(3):
        drafted, accepted = verifications(rng, 0.7, 4, 100)
        estimate.observe(np.zeros(100, dtype=np.int64), drafted, accepted)
        gaps.append(float(estimate.mean()[0] - estimate.lower()[0]))
    assert gaps == sorted(gaps, reverse=True)
    assert 0.0 < gaps[-1] < 0.03 < gaps[0]


def test_more_confidence_asks_for_a_lower_bound() -> None:
    assert AcceptanceEstimate(1, 2.0).lower()[0] < AcceptanceEstimate(1, 1.0).lower()[0]
    assert AcceptanceEstimate(1, 0.0).lower()[0] == pytest.approx(PRIOR_MEAN)


def test_old_verifications_are_forgotten() -> None:
    rng = np.random.default_rng(2)
    estimate = AcceptanceEstimate(1)
    for acceptance in (0.9, 0.2):
        for _ in range(int(5 * HALF_LIFE_DRAFTS / 100)):
            drafted, accepted = verifications(rng, acceptance, 2, 100)
            estimate.observe(np.zeros(100, dtype=np.int64), drafted, accepted)
    assert estimate.mean()[0] == pytest.approx(0.2, abs=0.05)


def test_nothing_verified_changes_nothing() -> None:
    estimate = AcceptanceEstimate(1)
    before = estimate.lower().copy()
    none = np.empty(0, dtype=np.int64)
    estimate.observe(none, none, none)
    assert estimate.lower() == before
