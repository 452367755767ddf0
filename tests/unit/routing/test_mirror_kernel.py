"""A mirror judges as the replica's own admission does, now and after it has moved on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slos_serve.core.plan import StepPlan
from slos_serve.core.request import Status
from slos_serve.core.verdict import Verdict
from slos_serve.planning.demand import SIZES
from slos_serve.planning.planner import Planner
from slos_serve.routing.mirror_arrays import advance, rate_beside
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.projection import after_step
from slos_serve.routing.publisher import own_admission, publication_of, snapshot_of
from slos_serve.routing.router import RouterSettings, route, verdicts
from tests.builders import OPT_13B_A100, EngineBuilder
from tests.unit.routing.fleet import NOW_S, loaded, mirrors_of, request


def _random_engine(rng: np.random.Generator, most_ahead_s: float = 0.0, max_num_seqs: int = 256) -> EngineBuilder:
    engine = EngineBuilder(total_blocks=int(rng.integers(400, 4000)), max_num_seqs=max_num_seqs)
    for _ in range(int(rng.integers(0, 120))):
        ahead_s = float(rng.uniform(0.0, most_ahead_s))
        engine.decode(tpot_s=float(rng.choice([0.05, 0.1])), prompt_tokens=int(rng.integers(20, 800)), ahead_s=ahead_s)
    for _ in range(int(rng.integers(0, 6))):
        engine.wait(int(rng.integers(20, 1500)), due_in_s=float(rng.uniform(0.3, 2.0)))
    return engine


def _verdicts(seed: int, most_ahead_s: float, max_num_seqs: int = 256) -> tuple[bool, bool]:
    """The mirror's and the replica's own."""
    rng = np.random.default_rng(seed)
    engine = _random_engine(rng, most_ahead_s, max_num_seqs)
    mirrors = mirrors_of(a=engine)
    prompt, due_in_s = int(rng.integers(20, 4000)), float(rng.uniform(0.2, 2.0))
    mirror = verdicts(NOW_S, request(prompt, due_in_s=due_in_s), mirrors)["a"]
    planner = Planner(OPT_13B_A100, 1)
    coefficients = OPT_13B_A100.coefficients * (1.0 + planner.settings.margin)
    slot = engine.wait(prompt, due_in_s=due_in_s)
    own = own_admission(planner, coefficients, engine.view(), NOW_S)
    return mirror, bool(own.admitted.taken[own.demand.slots == slot].any())


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_the_replica_on_what_it_has_just_published(seed: int) -> None:
    mirror, own = _verdicts(seed, most_ahead_s=0.0)
    assert mirror == own


def test_knows_the_time_that_decodes_ahead_of_their_deadlines_leave() -> None:
    found = np.array([_verdicts(seed, most_ahead_s=2.0) for seed in range(200)])
    # A mirror does not know that the asking prompt may end first: what decodes lend is not quite the replica's own.
    assert np.mean(found[:, 0] == found[:, 1]) >= 0.98


def _planner_in_a_crowd(rng: np.random.Generator) -> Planner:
    """One that has seen short prompts come, more than there are now."""
    planner = Planner(OPT_13B_A100, 1)
    load = np.zeros((2, SIZES))
    load[0, int(rng.integers(5, 9))] = float(rng.uniform(0.0, 3000.0))
    planner._memory = planner._memory._replace(arrivals=planner._memory.arrivals._replace(load=load))
    return planner


def test_charges_for_cheaper_requests_to_come_as_the_replica_does() -> None:
    found = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        engine, planner = loaded(int(rng.integers(0, 40))), _planner_in_a_crowd(rng)
        mirrors = Mirrors(["a"])
        assert mirrors.update(publication_of(planner, OPT_13B_A100, snapshot_of(engine.view(), NOW_S), replica="a"))
        prompt, due_in_s = int(rng.integers(400, 4000)), float(rng.uniform(0.5, 2.0))
        mirror = verdicts(NOW_S, request(prompt, due_in_s=due_in_s), mirrors)["a"]
        free = verdicts(NOW_S, request(prompt, due_in_s=due_in_s), mirrors_of(a=engine))["a"]
        slot = engine.wait(prompt, due_in_s=due_in_s)
        coefficients = OPT_13B_A100.coefficients * (1.0 + planner.settings.margin)
        own = own_admission(planner, coefficients, engine.view(), NOW_S)
        found.append((mirror, bool(own.admitted.taken[own.demand.slots == slot].any()), free))
    mirror_says, replica_says, uncharged = np.array(found).T
    assert (mirror_says == replica_says).all()
    assert replica_says.sum() < uncharged.sum() - 10, "the charge is what decides some of them"


def test_a_promise_that_is_made_is_charged_for_nobody() -> None:
    planner = _planner_in_a_crowd(np.random.default_rng(1))
    mirrors = Mirrors(["a"])
    mirrors.update(publication_of(planner, OPT_13B_A100, snapshot_of(loaded(5).view(), NOW_S), replica="a"))
    asked = request(1000, due_in_s=1.5)
    costs = []
    for binding in (False, True):
        route(NOW_S, replace(asked, binding=binding), mirrors)
        costs.append(float(mirrors.arrays.cost_tokens[0, : mirrors.arrays.num_owed[0]].sum()))
        mirrors.withdraw("a", mirrors.newest("a"))
    assert costs[1] == pytest.approx(1000, rel=0.1) and costs[0] > costs[1] + 100


def test_knows_how_many_seats_are_left() -> None:
    found = np.array([_verdicts(seed, most_ahead_s=0.0, max_num_seqs=64) for seed in range(200)])
    assert 0.05 < found[:, 1].mean() < 0.8
    assert np.mean(found[:, 0] == found[:, 1]) >= 0.95, np.mean(found, axis=0)


def test_a_seat_is_not_promised_twice() -> None:
    engine = EngineBuilder(max_num_seqs=3)
    for _ in range(2):
        slot = engine.decode(output_tokens=5, max_tokens=400)
        engine.table.rows["hint_tokens"][slot] = 400
    mirrors = mirrors_of(a=engine)
    several = [route(NOW_S, request(100, due_in_s=1.0), mirrors, RouterSettings()) for _ in range(3)]
    assert [one.verdict for one in several] == [Verdict.ADMITTED, Verdict.BEST_EFFORT, Verdict.BEST_EFFORT]


def test_the_end_of_a_step_is_what_the_next_plan_starts_from() -> None:
    engine = EngineBuilder()
    decode, last = engine.decode(), engine.decode(output_tokens=99)
    prefill, fresh, other = engine.prefilling(500, 100), engine.wait(300), engine.wait(50)
    engine.table.rows["cached_tokens"][fresh] = 160
    victim = engine.decode(status=Status.BEST_EFFORT)
    slots = np.array([decode, last, prefill, fresh], dtype=np.int64)
    plan = StepPlan(slots=slots, tokens=np.array([1, 1, 400, 100]), preempt=np.array([victim]), predicted_s=0.05)
    before = engine.table.rows.tobytes()
    after = after_step(engine.view(), plan, NOW_S + 0.05)
    assert engine.table.rows.tobytes() == before
    rows = after.table.rows
    assert after.running.tolist() == [decode, prefill, fresh]  # the last token of one came
    assert sorted(after.waiting.tolist()) == [other, victim]
    assert rows["computed_tokens"][[decode, prefill, fresh, victim]].tolist() == [210, 500, 260, 0]
    assert rows["output_tokens"][[decode, prefill, fresh]].tolist() == [11, 1, 0]
    assert rows["stage_start_s"][prefill] == rows["last_token_s"][decode] == NOW_S + 0.05


def test_owed_prompts_are_computed_as_time_passes() -> None:
    engine = loaded(10)
    engine.wait(1000, due_in_s=1.0)
    engine.wait(3000, due_in_s=2.0)
    m = mirrors_of(a=engine).arrays
    owed = m.cost_tokens[0, :2].copy()
    rate = rate_beside(m, 0, m.counts[0])
    m.lent_tokens[0] = 0.0
    advance(m, 0, NOW_S + 0.05)
    assert m.cost_tokens[0, 0] == pytest.approx(owed[0] - 0.05 * rate)
    advance(m, 0, NOW_S + owed[0] / rate + 1e-6)
    assert (m.first[0], m.num_owed[0]) == (1, 1)
    assert m.counts[0].sum() == 11.0
    # Past its deadline a prompt is owed no more, whatever the rate was.
    m.cost_tokens[0, 1] = 1e9
    advance(m, 0, NOW_S + 2.0)
    assert m.num_owed[0] == 0 and m.counts[0].sum() == 12.0


def test_owed_prompts_are_computed_sooner_beside_decodes_that_leave_time() -> None:
    engine = loaded(10)
    engine.wait(1000, due_in_s=1.0)
    m = mirrors_of(a=engine).arrays
    owed, rate = float(m.cost_tokens[0, 0]), rate_beside(m, 0, m.counts[0])
    m.moments_s[0] = NOW_S + 0.01 * np.arange(m.moments_s.shape[1])
    m.lent_tokens[0] = 100.0 * (m.moments_s[0] - NOW_S)
    advance(m, 0, NOW_S + 0.05)
    assert m.cost_tokens[0, 0] == pytest.approx(owed - 0.05 * (rate + 100.0))


def test_nothing_starts_before_the_running_step_ends() -> None:
    asked = request(300, due_in_s=0.3)
    mirrors = mirrors_of(a=loaded(0))
    assert verdicts(NOW_S, asked, mirrors) == {"a": True}
    mirrors.arrays.ready_s[0] = NOW_S + 0.28
    assert verdicts(NOW_S, asked, mirrors) == {"a": False}


def test_entering_a_request_leaves_the_mirror_as_a_publication_with_it_would() -> None:
    engine = loaded(10)
    engine.wait(500, due_in_s=0.4)
    engine.wait(500, due_in_s=1.4)
    mirrors = mirrors_of(a=engine)
    route(NOW_S, request(300, due_in_s=0.9), mirrors)
    engine.wait(300, due_in_s=0.9)
    entered, fresh = mirrors.arrays, mirrors_of(a=engine).arrays
    for name in ("num_owed", "due_s", "counts", "in_tier", "tier"):
        np.testing.assert_array_equal(getattr(entered, name)[0], getattr(fresh, name)[0], name)
    # One that the mirror enters itself counts at its peak: a little more than the forecast of a publication.
    assert (entered.memory_left[0] <= fresh.memory_left[0]).all()
    assert (entered.memory_left[0] > fresh.memory_left[0] - 20).all()
    for name in ("cost_tokens", "extra_s_each"):
        np.testing.assert_allclose(getattr(entered, name)[0], getattr(fresh, name)[0], err_msg=name)
