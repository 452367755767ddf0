"""Intervals of the mean of seeds, against values worked out by hand."""

from __future__ import annotations

import pytest

from slos_serve.sim.interval import ratio_interval, ratio_of_means, seed_interval


def test_students_t_of_three_seeds() -> None:
    low, high = seed_interval([1.0, 2.0, 3.0])
    assert low == 0.0  # it would be below
    assert high == pytest.approx(2.0 + 4.303 / 3**0.5)
    assert seed_interval([2.0]) == (2.0, 2.0)


def test_a_ratio_is_taken_seed_by_seed() -> None:
    centre, low, high = ratio_interval([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (centre, low, high) == pytest.approx((2.0, 2.0, 2.0))
    centre, low, high = ratio_interval([2.0, 8.0], [1.0, 1.0])
    assert centre == pytest.approx(4.0) and low < 1.0 < 10.0 < high


def test_a_ratio_of_shares_stands_though_a_seed_of_the_others_has_none() -> None:
    assert ratio_of_means([0.4, 0.2], [0.2, 0.1]) == pytest.approx((2.0, 2.0, 2.0))
    over, low, high = ratio_of_means([0.5, 0.3, 0.4], [0.2, 0.0, 0.1])
    assert over == pytest.approx(4.0) and low == 0.0
    # What is left of ours after four times the others: -0.3, 0.3, 0.
    assert high == pytest.approx(4.0 + 4.303 * 0.3 / 3**0.5 / 0.1)
    assert ratio_of_means([0.5, 0.3], [0.0, 0.0])[0] == float("inf")
