"""Weights of classes, and of tenants in a class, that are promised less than others."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.request import NUM_SHARES, share_of
from slos_serve.perf.class_shares import MOST, OVER_DECISIONS, ClassShares


def decide(shares: ClassShares, promised: dict[int, int], declined: dict[int, int], weights: tuple[float, ...]) -> None:
    """So many requests of each class, in one plan."""
    parts = [
        (index, kept, count) for kept, part in ((True, promised), (False, declined)) for index, count in part.items()
    ]
    counts = [count for _, _, count in parts]
    classes = np.repeat([index for index, _, _ in parts], counts).astype(np.int64)
    shares.decided(
        classes,
        np.repeat([kept for _, kept, _ in parts], counts).astype(bool),
        np.array(weights)[classes % len(weights)],
    )


ALL_ONE = (1.0, 1.0, 1.0)


def test_before_any_decision_weights_are_as_given() -> None:
    shares = ClassShares(3, 0.7)
    decide(shares, {}, {}, ALL_ONE)
    assert shares.boost[:3].tolist() == [1.0, 1.0, 1.0]


def test_a_class_below_the_floor_weighs_more_and_the_others_as_given() -> None:
    shares = ClassShares(3, 0.7)
    for _ in range(40):
        decide(shares, {0: 1}, {1: 1}, ALL_ONE)
    first, second, unseen = shares.boost[:3]
    assert first == unseen == 1.0
    assert second > 2.0


def test_a_class_below_the_mean_and_above_the_floor_weighs_as_given() -> None:
    shares = ClassShares(2, 0.7)
    for _ in range(40):  # 100 and 75 % promised, 87 % in the mean
        decide(shares, {0: 4, 1: 3}, {1: 1}, ALL_ONE)
    assert shares.boost[:2].tolist() == [1.0, 1.0]


def test_a_class_of_less_weight_may_lose_and_one_of_more_may_not() -> None:
    cheap, dear = ClassShares(2, 0.7), ClassShares(2, 0.7)
    for _ in range(40):
        decide(cheap, {0: 1}, {1: 1}, (2.0, 1.0))
        decide(dear, {0: 1}, {1: 1}, (1.0, 2.0))
    assert cheap.boost[:2].tolist() == [1.0, 1.0]
    assert dear.boost[0] == 1.0 and dear.boost[1] > 2.0


def test_all_declined_alike_weigh_as_given() -> None:
    shares = ClassShares(2, 1.0)
    for _ in range(40):
        decide(shares, {}, {0: 1, 1: 1}, ALL_ONE)
    assert shares.boost[:2].tolist() == [1.0, 1.0]


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
    assert shares.boost[:2].tolist() == [1.0, MOST]


def test_what_was_declined_long_ago_is_forgotten() -> None:
    shares = ClassShares(2, 0.7)
    decide(shares, {0: 50}, {1: 50}, ALL_ONE)
    before = shares.boost[1]
    for _ in range(int(4 * OVER_DECISIONS)):
        decide(shares, {0: 1, 1: 1}, {}, ALL_ONE)
    assert shares.boost[1] == 1.0 and before > 2.0


# Tenants -----------------------------------------------------------------------------------------------------------


def tenants_of(class_index: int, *tenants: int) -> list[int]:
    """Shares of tenants in one of three classes."""
    return [share_of(class_index, 3, tenant) for tenant in tenants]


def test_a_tenant_that_sends_little_weighs_more_until_it_has_what_it_is_due() -> None:
    crowd, lone = tenants_of(1, 1, 2)
    shares = ClassShares(3, 0.7)
    for _ in range(30):  # half of each tenant's requests are promised: 50 of 100 and 5 of 10
        decide(shares, {crowd: 5}, {crowd: 5}, ALL_ONE)
        decide(shares, {lone: 1}, {}, ALL_ONE)
        decide(shares, {crowd: 5}, {crowd: 5}, ALL_ONE)
        decide(shares, {}, {lone: 1}, ALL_ONE)
    assert 2.0 < shares.boost[lone] < (0.7 / 0.5) ** 4
    assert shares.boost[crowd] == 1.0
    for _ in range(30):  # now it is promised 9 of 10
        decide(shares, {crowd: 45, lone: 9}, {crowd: 55, lone: 1}, ALL_ONE)
    assert shares.boost[lone] == shares.boost[crowd] == 1.0


def test_tenants_that_ask_for_more_than_an_even_part_are_due_the_even_part() -> None:
    first, second, third = tenants_of(0, 1, 2, 3)
    shares = ClassShares(3, 0.7)
    for _ in range(30):  # 12 promises: third is due 2, which it asked for; the others 5 each, and second has 1
        decide(shares, {first: 9, second: 1, third: 2}, {first: 11, second: 9}, ALL_ONE)
    assert shares.boost[first] == shares.boost[third] == 1.0
    assert shares.boost[second] > 2.0


def test_a_tenant_alone_and_requests_of_nobody_weigh_as_given() -> None:
    (alone,) = tenants_of(2, 7)
    shares = ClassShares(3, 1.0)
    for _ in range(30):
        decide(shares, {alone: 1}, {alone: 9}, ALL_ONE)
    assert set(shares.boost.tolist()) == {1.0}


def test_tenants_in_one_class_change_no_other_and_both_rules_hold_together() -> None:
    crowd, lone = tenants_of(1, 1, 2)
    plain, tenants = ClassShares(3, 0.7), ClassShares(3, 0.7)
    for _ in range(30):  # class 0 gets all, class 1 half
        decide(plain, {0: 10, 1: 5}, {1: 5}, ALL_ONE)
        decide(tenants, {0: 10, crowd: 5}, {crowd: 4, lone: 1}, ALL_ONE)
    assert tenants.boost[0] == plain.boost[0] == 1.0
    assert tenants.boost[crowd] == pytest.approx(plain.boost[1])
    assert tenants.boost[lone] == MOST
    assert tenants.boost.max() <= MOST


def test_without_tenants_nothing_is_counted_by_tenant() -> None:
    shares = ClassShares(3, 0.7)
    decide(shares, {0: 1}, {1: 1}, ALL_ONE)
    assert shares._by_tenant is None


@pytest.mark.parametrize("num_classes", [1, 3, 7, 100, 200, NUM_SHARES, NUM_SHARES + 5])
def test_shares_of_a_class_never_reach_another_class(num_classes: int) -> None:
    for class_index in range(min(num_classes, NUM_SHARES)):
        assert share_of(class_index, num_classes) == class_index
        for tenant in (1, 2, 50, 1000):
            share = share_of(class_index, num_classes, tenant)
            assert 0 <= share < NUM_SHARES
            assert share % min(num_classes, NUM_SHARES) == class_index
