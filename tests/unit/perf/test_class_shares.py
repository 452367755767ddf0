"""Weights of classes that are promised less than others."""

from __future__ import annotations

import numpy as np

from slos_serve.perf.class_shares import MOST, OVER_DECISIONS, ClassShares


def decide(shares: ClassShares, promised: dict[int, int], declined: dict[int, int], weights: tuple[float, ...]) -> None:
    """So many requests of each class, in one plan."""
    parts = [
        (index, kept, count) for kept, part in ((True, promised), (False, declined)) for index, count in part.items()
    ]
    counts = [count for _, _, count in parts]
    classes = np.repeat([index for index, _, _ in parts], counts).astype(np.int64)
    shares.decided(classes, np.repeat([kept for _, kept, _ in parts], counts).astype(bool), np.array(weights)[classes])


ALL_ONE = (1.0, 1.0, 1.0)


def test_before_any_decision_weights_are_as_given() -> None:
    shares = ClassShares(3, 0.7)
    decide(shares, {}, {}, ALL_ONE)
    assert shares.boost.tolist() == [1.0, 1.0, 1.0]


def test_a_class_below_the_floor_weighs_more_and_the_others_as_given() -> None:
    shares = ClassShares(3, 0.7)
    for _ in range(40):
        decide(shares, {0: 1}, {1: 1}, ALL_ONE)
    first, second, unseen = shares.boost
    assert first == unseen == 1.0
    assert second > 2.0


def test_a_class_below_the_mean_and_above_the_floor_weighs_as_given() -> None:
    shares = ClassShares(2, 0.7)
    for _ in range(40):  # 100 and 75 % promised, 87 % in the mean
        decide(shares, {0: 4, 1: 3}, {1: 1}, ALL_ONE)
    assert shares.boost.tolist() == [1.0, 1.0]


def test_a_class_of_less_weight_may_lose_and_one_of_more_may_not() -> None:
    cheap, dear = ClassShares(2, 0.7), ClassShares(2, 0.7)
    for _ in range(40):
        decide(cheap, {0: 1}, {1: 1}, (2.0, 1.0))
        decide(dear, {0: 1}, {1: 1}, (1.0, 2.0))
    assert cheap.boost.tolist() == [1.0, 1.0]
    assert dear.boost[0] == 1.0 and dear.boost[1] > 2.0


def test_all_declined_alike_weigh_as_given() -> None:
    shares = ClassShares(2, 1.0)
    for _ in range(40):
        decide(shares, {}, {0: 1, 1: 1}, ALL_ONE)
    assert shares.boost.tolist() == [1.0, 1.0]


def test_the_boost_grows_with_fairness_within_bounds() -> None:
    boosts = []
    for fairness in (0.0, 0.6, 0.8, 1.0):
        shares = ClassShares(2, fairness)
        for _ in range(100):  # 100 and 50 % promised, 75 % in the mean
            decide(shares, {0: 2, 1: 1}, {1: 1}, ALL_ONE)
        boosts.append(float(shares.boost[1]))
    assert boosts[0] == boosts[1] == 1.0
    assert 1.0 < boosts[2] < boosts[3] < MOST


def test_nobody_weighs_more_than_the_most() -> None:
    shares = ClassShares(2, 1.0)
    for _ in range(300):
        decide(shares, {0: 1}, {1: 3}, ALL_ONE)
    assert shares.boost.tolist() == [1.0, MOST]


def test_what_was_declined_long_ago_is_forgotten() -> None:
    shares = ClassShares(2, 0.7)
    decide(shares, {0: 50}, {1: 50}, ALL_ONE)
    before = shares.boost[1]
    for _ in range(int(4 * OVER_DECISIONS)):
        decide(shares, {0: 1, 1: 1}, {}, ALL_ONE)
    assert shares.boost[1] == 1.0 and before > 2.0
