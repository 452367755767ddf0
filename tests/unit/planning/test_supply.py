"""Tiers, and what decodes leave and lend."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.planning.supply import MAX_TIERS, tier_of, tier_paces
from tests.builders import EngineBuilder

NONE = np.empty(0, dtype=np.int64)


def paces(tpots_s: list[float]) -> np.ndarray:
    engine = EngineBuilder()
    for tpot_s in tpots_s:
        engine.decode(tpot_s=tpot_s, ahead_s=0.01)
    found: np.ndarray = tier_paces(engine.state(), NONE)
    return found


def test_few_paces_are_tiers_of_their_own() -> None:
    assert paces([0.1, 0.05, 0.1, 0.2]).tolist() == [0.05, 0.1, 0.2]


def test_paces_within_five_per_cent_share_a_tier() -> None:
    assert paces([0.100, 0.104, 0.110]).tolist() == [0.100, 0.110]


@pytest.mark.parametrize("count", [5, 64, 65, 200])
def test_the_tightest_pace_is_never_dropped(count: int) -> None:
    """Review, A9: with more than 64 distinct TPOTs the tightest was."""
    tpots_s = [0.131 + 0.006 * k for k in range(count)]
    found = paces(tpots_s[1:] + tpots_s[:1])
    assert found[0] == 0.131
    assert len(found) <= MAX_TIERS
    assert all(found[tier_of(found, tpot_s)] <= tpot_s for tpot_s in tpots_s)


def test_no_promise_is_one_tier_without_a_pace() -> None:
    assert paces([]).tolist() == [np.inf]
    assert paces([0.1, np.inf]).tolist() == [0.1, np.inf]
