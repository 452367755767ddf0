"""Requests without a promise: their room, and that each ends however long overload lasts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from slos_serve.core.plan import Reason, StepPlan
from slos_serve.core.request import NUM_SHARES, Status
from slos_serve.core.slo import SLO, single_stage
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.best_effort import (
    LEAD_OF_PACE,
    LEAD_OF_STALL,
    NO_TURN,
    NOBODY,
    Turn,
    ahead_enough,
    count_begun,
    in_fair_order,
    next_turn,
    shares_now,
    tokens_to_begin,
)
from slos_serve.planning.form import MOST_LEFT_FREE, ROOM_FOR
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from slos_serve.planning.state import peak_blocks
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.model_error import ModelError
from slos_serve.sim.outcome import score
from slos_serve.sim.recording import Recording
from slos_serve.workload.calls import Workload
from tests.builders import OPT_13B_A100, EngineBuilder, carried_out
from tests.sim_builders import GPU, run, workload

FREE = single_stage("free", SLO())
LOW = single_stage("low", SLO(ttft_ms=4000.0, tpot_ms=100.0), weight=0.01)
CHAT = single_stage("chat", SLO(ttft_ms=1000.0, tpot_ms=100.0))
AGING_S = 5.0


def starts_beside(prompt_tokens: Sequence[int], total_blocks: int) -> tuple[bool, float, float]:
    """Whether a request without a promise starts beside promised decodes with such prompts; the KV blocks that all of
    them come to hold, and the mean of the decodes."""
    engine = EngineBuilder(total_blocks=total_blocks)
    decodes = [engine.decode(prompt_tokens=tokens, ahead_s=1.5) for tokens in prompt_tokens]
    slot = engine.best_effort(320)
    engine.table.rows["status"][slot] = Status.BEST_EFFORT
    plan = carried_out(Planner(OPT_13B_A100, 2), engine.now_s, engine.view())
    *theirs, own = (peak_blocks(engine.table.rows, each, engine.block_size) for each in (*decodes, slot))
    return slot in plan.slots, sum(theirs) + own, float(np.mean(theirs))


@pytest.mark.parametrize("prompt_tokens", [(320,), (160,) * 8, (40, 600), (20_000,)])
def test_a_start_leaves_kv_for_requests_like_the_promised_ones(prompt_tokens: tuple[int, ...]) -> None:
    for total_blocks in range(40, 4000, 37):
        starts, held, each = starts_beside(prompt_tokens, total_blocks)
        assert starts is (total_blocks - held >= min(ROOM_FOR * each, MOST_LEFT_FREE * total_blocks))


def full_engine() -> EngineBuilder:
    """Promises leave no room in a step: decodes due at once, and a prompt that takes what is left."""
    engine = EngineBuilder()
    for _ in range(40):
        engine.decode(prompt_tokens=1000, tpot_s=0.1, ahead_s=0.01)
    engine.prefilling(3000, 100, due_in_s=5.0)
    return engine


def plan_at(planner: Planner, engine: EngineBuilder, after_s: float) -> StepPlan:
    """A plan that much later, everything promised as due as it was."""
    view = engine.view()
    for name in ("stage_start_s", "last_token_s", "ttft_due_s"):
        view.table.rows[name] += after_s
    plan = carried_out(planner, engine.now_s + after_s, view)
    for name in ("stage_start_s", "last_token_s", "ttft_due_s"):
        view.table.rows[name] -= after_s
    return plan


def test_the_oldest_gets_a_turn_when_its_time_is_up() -> None:
    engine = full_engine()
    old, young = engine.best_effort(500), engine.best_effort(500)
    planner = Planner(OPT_13B_A100, 2, PlannerSettings(aging_s=AGING_S))
    assert old not in plan_at(planner, engine, 0.0).slots
    assert old not in plan_at(planner, engine, 0.9 * AGING_S).slots
    plan = plan_at(planner, engine, AGING_S)
    assert plan.tokens[plan.slots == old].sum() >= 64
    assert young not in plan.slots


def test_a_turn_takes_no_decode_of_its_due_token() -> None:
    engine = full_engine()
    engine.best_effort(500)
    planner = Planner(OPT_13B_A100, 2, PlannerSettings(aging_s=AGING_S))
    first = plan_at(planner, engine, 0.0)
    turn = plan_at(planner, engine, AGING_S)
    due = set(first.slots[first.reasons == Reason.DECODE_DUE].tolist())
    assert due
    assert due <= set(turn.slots.tolist())


def turns(engine: EngineBuilder, moments_s: tuple[float, ...], every_s: float = AGING_S) -> list[Turn]:
    """Who has the turn at each moment, nothing else changing."""
    found = [NO_TURN]
    for after_s in moments_s:
        found.append(next_turn(engine.state()._replace(now_s=engine.now_s + after_s), found[-1], every_s))
    return found[1:]


def test_the_oldest_is_kept_once_its_time_is_up() -> None:
    engine = EngineBuilder()
    slot = engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    first, early, last = turns(engine, (0.0, 0.9 * AGING_S, AGING_S))
    assert (first.kept, early.kept, early.due) == (NOBODY, NOBODY, False)
    assert (last.kept, last.due) == (slot, True)


def test_progress_puts_the_turn_off() -> None:
    engine = EngineBuilder()
    slot = engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    turn = NO_TURN
    for after_s in (0.0, 4.0, 8.0, 12.0):
        turn = next_turn(engine.state()._replace(now_s=engine.now_s + after_s), turn, AGING_S)
        assert not turn.due
        engine.table.rows["output_tokens"][slot] += 1
        engine.table.rows["computed_tokens"][slot] += 1


def test_what_a_preemption_takes_is_no_progress() -> None:
    engine = EngineBuilder()
    slot = engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    computed, turn = int(engine.table.rows["computed_tokens"][slot]), NO_TURN
    for after_s, tokens in ((0.0, computed), (2.0, 0), (4.0, computed), (AGING_S, computed)):
        engine.table.rows["computed_tokens"][slot] = tokens
        turn = next_turn(engine.state()._replace(now_s=engine.now_s + after_s), turn, AGING_S)
    assert turn.due


def test_a_kept_request_stays_the_one_though_an_older_one_loses_its_promise() -> None:
    """Else the KV of its turns would be taken from it and computed again, without end."""
    engine = EngineBuilder()
    older = engine.decode(ahead_s=0.1)
    slot = engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    kept = turns(engine, (0.0, AGING_S))[-1]
    engine.table.rows["status"][older] = Status.BEST_EFFORT
    assert next_turn(engine.state()._replace(now_s=engine.now_s + 6.0), kept, AGING_S).kept == slot


def test_a_turn_is_not_begun_before_its_peak_fits_beside_the_promises() -> None:
    engine = EngineBuilder(total_blocks=130)
    for _ in range(3):
        engine.decode(prompt_tokens=480, ahead_s=0.1, max_tokens=20)
    engine.best_effort(800)
    waits = turns(engine, (0.0, AGING_S))[-1]
    assert waits.kept == engine.waiting[0] and not waits.due
    engine.running.pop()
    assert turns(engine, (0.0, AGING_S))[-1].due


def test_whoever_may_still_be_promised_has_no_turn() -> None:
    """A long prompt that is due in minutes may start late: KV kept for it meanwhile is taken from others."""
    engine = full_engine()
    slot = engine.wait(5000, due_in_s=300.0)
    other = engine.best_effort(500)
    engine.table.rows["order"][slot] = engine.table.rows["order"][other] - 1
    assert turns(engine, (0.0, AGING_S))[-1].kept == other
    engine.table.rows["ttft_due_s"][slot] = np.inf  # it could wait for ever
    assert turns(engine, (0.0, AGING_S))[-1].kept == slot


def test_the_rule_can_be_switched_off() -> None:
    engine = full_engine()
    engine.best_effort(500)
    assert turns(engine, (0.0, 1e9), 0.0)[-1] == NO_TURN


OVERLOAD_S = 120.0
LIMITS = EngineLimits(kv_capacity_tokens=16 * 1000, max_num_batched_tokens=8192)


def overload() -> Workload:
    """Far more promised work than the engine can do, for two minutes; early on, one of each kind that loses."""
    arrivals = np.sort(np.random.default_rng(0).uniform(0.0, OVERLOAD_S, 1740)).tolist()
    count = len(arrivals)
    kinds = [0] * count
    kinds[20], kinds[30] = 1, 2
    return workload(arrivals, [700] * count, [60] * count, (CHAT, FREE, LOW), kinds)


def longest_gap_s(recording: Recording, call: int) -> float:
    """Longest time a call went without a token while overload lasted, from its arrival on."""
    first = int(recording.token_start[call])
    own = recording.token_s[first : first + int(recording.workload.calls["output_tokens"][call])]
    arrival_s = float(recording.calls["arrival_s"][call])
    times = np.concatenate(([0.0], np.minimum(own, OVERLOAD_S - arrival_s)))
    return float(np.diff(times).max())


@pytest.mark.parametrize("aging_s", [3.0, 0.0])
def test_everyone_ends_while_overload_lasts(aging_s: float) -> None:
    load = overload()
    parameters = {"aging_s": aging_s}
    recording = run(load, "slos-serve", GPU, LIMITS, parameters=parameters)
    calls = [int(np.flatnonzero(load.calls["class_index"] == kind)[0]) for kind in (1, 2)]
    gaps = [longest_gap_s(recording, call) for call in calls]
    done_s = [float(recording.calls["done_s"][call]) for call in calls]
    if aging_s > 0.0:
        assert max(done_s) < OVERLOAD_S
    else:
        assert max(done_s) > OVERLOAD_S  # else this test could not fail
        assert max(gaps) > 30.0


@pytest.mark.parametrize("aging_s", [10.0, 0.0])
def test_long_prompts_are_not_computed_again_and_again(aging_s: float) -> None:
    """Prompts of 1,000 to 60,000 tokens in overload: turns take no more recomputation than there is without them."""
    rng = np.random.default_rng(3)
    count = 120
    prompts = np.clip(rng.lognormal(np.log(6000), 1.2, count), 1000, 60_000).astype(int).tolist()
    outputs = np.clip(rng.lognormal(np.log(100), 0.6, count), 10, 400).astype(int).tolist()
    arrivals = np.cumsum(rng.exponential(1.5, count)).tolist()
    load = workload(arrivals, prompts, outputs, (single_stage("long", SLO(ttft_slowdown=5.0, tpot_ms=100.0)),))
    limits = EngineLimits(kv_capacity_tokens=150_000, max_num_batched_tokens=8192)
    recording = run(load, "slos-serve", GPU, limits, parameters={"aging_s": aging_s})
    assert recording.completed.all()
    needed = sum(prompts) + sum(outputs) - count
    assert float(recording.steps.rows["new_tokens"].sum()) / needed - 1.0 < 0.06


def test_prompts_without_a_promise_wait_while_promised_decodes_could_gain_lead() -> None:
    engine = EngineBuilder()
    slots = np.array([engine.decode(tpot_s=0.1, output_tokens=100)])
    rows, now_s = engine.table.rows, engine.now_s
    stall_s = rows["max_stall_s"][slots]
    assert ahead_enough(rows, slots, now_s + 1.01 * LEAD_OF_STALL * stall_s, now_s)
    assert not ahead_enough(rows, slots, now_s + 0.99 * LEAD_OF_STALL * stall_s, now_s)
    rows["stage_tokens"][slots] = 10  # in so short a time nobody can be that far ahead
    assert ahead_enough(rows, slots, np.array([now_s + 1.01 * LEAD_OF_PACE]), now_s)
    assert not ahead_enough(rows, slots, np.array([now_s + 0.99 * LEAD_OF_PACE]), now_s)
    rows["tpot_s"][slots] = np.inf  # promised no pace: it keeps nobody waiting
    assert ahead_enough(rows, slots, np.array([now_s]), now_s)


@pytest.mark.parametrize(("bias", "later"), [(1.0, 4.0), (1.25, 15.0)])
def test_in_a_calm_hour_requests_without_a_promise_come_about_as_soon_as_on_stock(bias: float, later: float) -> None:
    """Short answers on a slow engine at 45 % of its capacity, steps as modelled or slower; one request in ten asks for
    nothing. The last of these waits twice (8 times) as long as on stock, with a lead that 40 tokens cannot gain 8 (45)
    times."""
    slow = BatchTimeModel(k_c_s=1.2e-3, b_c_s=0.027, k_m_s=0.0, b_m_s=0.034, k_ctx_s=4e-6, k_seq_s=6e-4)
    promised = single_stage("promised", SLO(ttft_slowdown=5.0, ttft_floor_ms=350.0, tpot_ms=100.0))
    last_s, kept, count = np.zeros(2), np.zeros(2), 200
    for seed in range(4):
        rng = np.random.default_rng(seed)
        arrivals = np.cumsum(rng.gamma(4.0, 0.25, count))
        prompts = rng.lognormal(np.log(130.0), 0.5, count).astype(int).tolist()
        asks = (rng.random(count) < 0.9).astype(int).tolist()
        load = workload(arrivals.tolist(), prompts, [40] * count, (FREE, promised), asks)
        error = ModelError(bias=bias, noise=0.1)
        for side, policy in enumerate(("slos-serve", "vllm")):
            scores = score(run(load, policy, slow, error=error, scheduling_s=0.003))
            last_s[side] += scores.ttft_s[load.calls["class_index"] == 0].max()
            kept[side] += scores.attained.sum()
    assert last_s[0] < later * last_s[1]
    assert kept[0] >= kept[1]


def of_share(engine: EngineBuilder, share: int, prompt_tokens: int = 200) -> int:
    """A waiting request without a promise."""
    slot = engine.best_effort(prompt_tokens)
    engine.table.rows["share"][slot] = share
    return slot


def fair_order(engine: EngineBuilder, begun: np.ndarray, most: int = 100) -> list[int]:
    state = engine.state()
    slots: list[int] = in_fair_order(state, state.waiting, shares_now(state, begun), most).tolist()
    return slots


def test_no_more_are_put_in_order_than_can_start() -> None:
    engine, rng = EngineBuilder(), np.random.default_rng(5)
    for share, tokens in zip(rng.integers(0, 4, 60).tolist(), rng.integers(1, 9, 60).tolist(), strict=True):
        of_share(engine, share, 100 * tokens)
    begun = np.array([*rng.integers(0, 3000, 4).tolist(), *[0] * (NUM_SHARES - 4)], dtype=float)
    every = fair_order(engine, begun)
    assert len(every) == 60
    for most in range(62):
        assert fair_order(engine, begun, most) == every[:most]


def waited(engine: EngineBuilder, slot: int, seconds: float) -> int:
    """The same request, having waited for so long."""
    engine.table.rows["arrival_s"][slot] = engine.now_s - seconds
    return slot


def test_of_one_share_and_size_the_first_come_start_first_however_the_engine_lists_them() -> None:
    engine = EngineBuilder()
    slots = [waited(engine, of_share(engine, share), 9.0 - share) for share in (2, 1, 3)]
    engine.table.rows["share"][slots] = 3
    assert fair_order(engine, np.zeros(NUM_SHARES)) == [slots[1], slots[0], slots[2]]


def test_of_one_share_whoever_waited_longest_for_what_it_asks_starts_first() -> None:
    engine = EngineBuilder()
    long, short, later = (of_share(engine, 3, tokens) for tokens in (5000, 500, 500))
    rows = engine.state().rows
    ratio = tokens_to_begin(rows, long) / tokens_to_begin(rows, short)
    waited(engine, long, 10.0)
    waited(engine, short, 10.1 / ratio)
    waited(engine, later, 9.9 / ratio)
    assert fair_order(engine, np.zeros(NUM_SHARES)) == [short, long, later]


@pytest.mark.parametrize(("each_s", "is_next"), [(1, True), (2, False)])
def test_a_long_request_is_next_once_short_ones_wait_no_longer_than_before(each_s: int, is_next: bool) -> None:
    """A short one comes each second. Where one starts every two, their waits grow too: only turns help the long one."""
    engine = EngineBuilder()
    long, first = waited(engine, of_share(engine, 0, 4000), 0.0), -1
    for _ in range(5):
        waited(engine, of_share(engine, 0, 100), 1.0)
    for second in range(400):
        waited(engine, of_share(engine, 0, 100), 0.0)
        engine.now_s += 1.0
        first = fair_order(engine, np.zeros(NUM_SHARES), 1)[0]
        if first == long:
            assert second > 10
            break
        if second % each_s == 0:
            engine.waiting.remove(first)
    assert (first == long) is is_next


def test_a_crowd_of_one_share_does_not_keep_another_waiting() -> None:
    engine = EngineBuilder()
    crowd = [of_share(engine, 0) for _ in range(20)]
    late = [of_share(engine, 1) for _ in range(3)]
    assert fair_order(engine, np.zeros(NUM_SHARES))[:6] == [crowd[0], late[0], crowd[1], late[1], crowd[2], late[2]]


def test_long_requests_count_for_more() -> None:
    engine = EngineBuilder()
    long = [of_share(engine, 0, 1000) for _ in range(2)]
    short = [of_share(engine, 1, 150) for _ in range(6)]
    assert fair_order(engine, np.zeros(NUM_SHARES)) == [long[0], *short[:5], long[1], short[5]]


def test_a_share_with_nobody_waiting_saves_nothing_up() -> None:
    engine = EngineBuilder()
    begun = np.zeros(NUM_SHARES)
    begun[0] = 50_000.0
    slot = of_share(engine, 0)
    begun = shares_now(engine.state(), begun)
    assert begun[1] == 50_000.0
    crowd = [of_share(engine, 1) for _ in range(3)]
    assert fair_order(engine, begun)[:2] == [slot, crowd[0]]


def test_what_starts_is_counted_for_its_share_alone() -> None:
    engine, begun = EngineBuilder(), np.zeros(NUM_SHARES)
    starts, promised = of_share(engine, 5), engine.wait()
    running = engine.decode(status=Status.BEST_EFFORT)
    state = engine.state()
    count_begun(state, np.array([starts, promised, running]), begun)
    assert begun[5] == begun.sum() == tokens_to_begin(state.rows, starts) > 200.0


def test_in_overload_each_share_begins_as_many_tokens() -> None:
    """Two shares, the first with eight times the requests, start one step after the other."""
    engine, planner = EngineBuilder(), Planner(OPT_13B_A100, 2)
    shares = [int(number % 9 == 8) for number in range(90)]
    waiting = [of_share(engine, share, 600) for share in shares]
    started: list[int] = []
    for step in range(6):
        plan = carried_out(planner, engine.now_s + step, engine.view())
        for slot, tokens in zip(plan.slots.tolist(), plan.tokens.tolist(), strict=True):
            row = engine.table.rows[slot]
            if row["running"] == 0:
                row["running"] = 1
                engine.running.append(slot)
                engine.waiting.remove(slot)
                started.append(shares[waiting.index(slot)])
            row["computed_tokens"] += tokens
            row["output_tokens"] = row["stage_tokens"] = int(row["computed_tokens"] >= 600)
    assert len(started) >= 12
    assert sum(started) == pytest.approx(len(started) / 2, abs=1)
