"""Which paces share a tier."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from slos_serve.planning.tiers import MAX_TIERS, tier_of, tier_paces
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


def charged(tiers_s: np.ndarray, tpots_s: list[float]) -> float:
    """Tokens a second that tiers charge for decodes of these paces."""
    return float(sum(1.0 / tiers_s[tier_of(tiers_s, tpot_s)] for tpot_s in tpots_s))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_tiers_charge_fewer_tokens(seed: int) -> None:
    """The paces of a tier are neighbours, so all choices of where tiers begin are tried."""
    random = np.random.default_rng(seed)
    distinct = 0.01 * np.cumprod(random.uniform(1.06, 4.0, size=9))
    tpots_s = random.choice(distinct, size=40).tolist()
    found, present = paces(tpots_s), sorted(set(tpots_s))
    choices = combinations(present[1:], MAX_TIERS - 1)
    best = min(charged(np.array([present[0], *begins]), tpots_s) for begins in choices)
    assert charged(found, tpots_s) == pytest.approx(best)


def test_a_late_answer_and_a_distant_one_do_not_tighten_everybody() -> None:
    """Tiers as wide as four need to be for paces of 14 ms to 10 s charged 50 ms as 14 ms, and nobody was admitted."""
    tpots_s = [0.05] * 200 + [0.1] * 40 + [0.014, 0.06, 0.15, 0.4, 1.0, 3.0, 10.0]
    asked = sum(1.0 / tpot_s for tpot_s in tpots_s)
    assert charged(paces(tpots_s), tpots_s) < 1.02 * asked


def test_no_promise_is_one_tier_without_a_pace() -> None:
    assert paces([]).tolist() == [np.inf]
    assert paces([0.1, np.inf]).tolist() == [0.1, np.inf]
