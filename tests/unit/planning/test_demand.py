"""Who asks, who is given up, and what a request is charged for."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.request import Status
from slos_serve.planning.demand import MOST_ASKING, SIZES, build_demand, is_lost, most_urgent, size_of
from slos_serve.planning.tiers import tier_paces
from tests.builders import EngineBuilder


def test_a_stage_that_its_forecast_cannot_save_is_given_up() -> None:
    """Review, A10: up to ``max_tokens`` it stayed promised, and its past due time ended every step."""
    engine = EngineBuilder()
    slot = engine.decode(output_tokens=40, max_tokens=1024, tpot_s=0.05, ahead_s=-2.0)
    engine.table.rows["expected_tokens"][slot] = 60
    assert is_lost(engine.state(), slot)
    engine.table.rows["expected_tokens"][slot] = 1000
    assert not is_lost(engine.state(), slot)


def test_the_most_urgent_are_asked_and_the_promised_ones_always() -> None:
    engine = EngineBuilder()
    due_s = np.random.default_rng(0).permutation(2 * MOST_ASKING) / 100.0
    slots = np.array([engine.wait(50, due_in_s=5.0 + float(at)) for at in due_s])
    engine.table.rows["status"][slots[np.argmax(due_s)]] = Status.ADMITTED
    asked = most_urgent(engine.state())
    assert len(asked) == MOST_ASKING + 1
    assert slots[np.argmax(due_s)] in asked
    assert due_s[np.isin(slots, asked)].min() == 0.0
    assert np.sort(due_s[np.isin(slots, asked)])[:-1].max() < MOST_ASKING / 100.0


@pytest.mark.parametrize(("tokens", "size"), [(1.0, 0), (2.0, 1), (3.0, 2), (1024.0, 10), (1e12, SIZES - 1)])
def test_sizes_are_powers_of_two(tokens: float, size: int) -> None:
    assert size_of(tokens) == size


def test_only_cheaper_requests_to_come_are_charged_and_only_before_the_promise() -> None:
    engine = EngineBuilder()
    short, long = engine.wait(100, due_in_s=2.0), engine.wait(2000, due_in_s=2.0)
    load = np.zeros((2, SIZES))
    load[:, 9] = 300.0, 150.0  # tokens a second of prompts of 256 to 512 tokens, due 0.5 s after they come
    found = {}
    for promised in (False, True):
        engine.table.rows["status"][long] = Status.ADMITTED if promised else Status.UNDECIDED
        state = engine.state()
        demand = build_demand(state, state.waiting, tier_paces(state, state.waiting), 30.0, 0.0, load)
        found[promised] = dict(zip(demand.slots.tolist(), demand.tokens.tolist(), strict=True))
    assert found[False][long] == pytest.approx(found[True][long] + 450.0)
    assert found[False][short] == found[True][short] < 200.0


@pytest.mark.parametrize(("weight", "times"), [(0.1, 10.0), (0.5, 2.0), (1.0, 1.0), (4.0, 1.0)])
def test_who_weighs_less_is_charged_more_for_those_to_come(weight: float, times: float) -> None:
    engine = EngineBuilder()
    slot = engine.wait(20_000, due_in_s=2.0, weight=weight)
    load = np.zeros((2, SIZES))
    load[:, 9] = 300.0, 150.0
    charged = []
    for arrivals in (np.zeros((2, SIZES)), load):
        state = engine.state()
        demand = build_demand(state, state.waiting, tier_paces(state, state.waiting), 30.0, 0.0, arrivals)
        assert demand.slots.tolist() == [slot]
        charged.append(demand.tokens[0])
    assert charged[1] - charged[0] == pytest.approx(times * 450.0)
