"""Draft lengths from plan to plan, and what batches do with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slos_serve.core.plan import Reason, StepPlan
from slos_serve.core.request import Status
from slos_serve.perf.acceptance import AcceptanceEstimate
from slos_serve.perf.batch_time import BatchShape
from slos_serve.planning.admission import Question, admission_of
from slos_serve.planning.demand import SIZES
from slos_serve.planning.drafting import PROBE_EVERY_S, PROBE_TOKENS, DraftPlan, no_drafts, plan_drafts
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from slos_serve.planning.tiers import tiers_of
from tests.builders import OPT_13B_A100, EngineBuilder

DRAFTER = dataclasses.replace(OPT_13B_A100, k_s_s=1e-3)
DRAFTS = PlannerSettings(max_draft_tokens=10)
LONGEST_STEP_S = 0.14


def loaded(decodes: int = 40, **decode: float) -> EngineBuilder:
    """An engine with prefill to do beside its decodes."""
    engine = EngineBuilder(total_blocks=20_000)
    for _ in range(decodes):
        engine.decode(prompt_tokens=1000, ahead_s=0.09, **decode)  # type: ignore[arg-type]  # numbers by name
    for _ in range(3):
        engine.wait(1500, due_in_s=1.5)
    return engine


def taught(estimate: AcceptanceEstimate, acceptance: float) -> AcceptanceEstimate:
    """What it is once thousands of drafts were right that often."""
    tested = np.ones(4000, dtype=np.int64)
    right = (np.arange(4000) % 10 < round(10 * acceptance)).astype(np.int64)
    for class_index in (0, 1):
        estimate.observe(class_index * tested, tested, right)
    return estimate


def planner_that_knows(settings: PlannerSettings = DRAFTS, acceptance: float = 0.7) -> Planner:
    planner = Planner(DRAFTER, 2, settings)
    taught(planner.acceptance, acceptance)
    return planner


def planned(
    engine: EngineBuilder,
    settings: PlannerSettings = DRAFTS,
    *,
    acceptance: float = 0.7,
    free_blocks: int | None = None,
) -> StepPlan:
    return planner_that_knows(settings, acceptance).plan(engine.now_s, engine.view(free_blocks=free_blocks))


def chosen(
    estimate: AcceptanceEstimate,
    engine: EngineBuilder,
    after_s: float = 0.0,
    last: DraftPlan | None = None,
    longest: int = 10,
) -> DraftPlan:
    """Lengths for the step after the one planned with ``last``."""
    state = engine.state(model=DRAFTER)._replace(now_s=engine.now_s + after_s)
    tiers = tiers_of(state, state.waiting, estimate.lower())
    return plan_drafts(state, tiers, last or no_drafts(), longest, LONGEST_STEP_S)


def drafts_of(plan: StepPlan, slots: list[int]) -> list[int]:
    """Draft length of those of ``slots`` that run."""
    return [int(draft) for slot, draft in zip(plan.slots, plan.draft_tokens, strict=True) if slot in slots]


def test_without_a_drafter_nothing_is_drafted() -> None:
    plan = planned(loaded(), PlannerSettings())
    assert len(plan.draft_tokens) == 0
    assert len(chosen(AcceptanceEstimate(2), loaded(), longest=0).tokens) == 0


def test_decodes_verify_their_drafts_and_one_token_more() -> None:
    engine = loaded()
    plan = planned(engine)
    drafts = drafts_of(plan, engine.running)
    assert drafts and min(drafts) > 0
    decodes = np.isin(plan.slots, engine.running)
    assert (plan.tokens[decodes] == 1 + plan.draft_tokens[decodes]).all()
    assert (plan.draft_tokens[~decodes] == 0).all()


def test_a_plan_takes_as_long_as_the_formula_says() -> None:
    """Each draft to verify is sampled, as each request is."""
    model = dataclasses.replace(DRAFTER, k_seq_s=2e-4)
    engine = loaded(20)
    planner = Planner(model, 2, PlannerSettings(max_draft_tokens=3))
    taught(planner.acceptance, 0.9)
    plan = planner.plan(engine.now_s, engine.view())
    rows = engine.table.rows
    done, drafts = rows["computed_tokens"][plan.slots], plan.draft_tokens
    prompts = (drafts == 0) & (plan.tokens > 1)
    shape = BatchShape(
        new_tokens=plan.num_tokens,
        context_tokens=int(done.sum()),
        quad_tokens2=int((plan.tokens * (plan.tokens + 2 * done))[prompts].sum()),
        num_seqs=len(plan.slots),
        draft_steps=int(drafts.max()),
        draft_tokens=int(drafts.sum()),
    )
    assert shape.draft_tokens > 0 and prompts.any()
    assert plan.predicted_s == pytest.approx(model.step_s(shape) * (1.0 + planner.step_margin))


def test_drafts_leave_more_room_for_prompts() -> None:
    """The rate that admission counts on grows, so more is promised."""
    engine = loaded(55)
    for k in range(30):
        engine.wait(700, due_in_s=1.0 + 0.1 * k)
    planner, state = planner_that_knows(), engine.state(model=DRAFTER)
    tiers, taken = tiers_of(state, state.waiting, planner.acceptance.lower()), []
    for drafts in (no_drafts(), chosen(planner.acceptance, engine)):
        survival, load = planner.lengths.survival(), np.zeros((2, SIZES))
        question = Question(tiers, drafts, 0.2, load, survival, state.total_blocks, 30.0, 0.0)
        taken.append(admission_of(state, state.waiting, question).admitted.taken.sum())
    assert taken[1] > taken[0] > 0


def test_a_drafter_does_not_make_steps_of_prompts_longer() -> None:
    """Nobody decodes yet, but prompts ask: one that comes during the step has its first token due as soon."""
    planned_tokens = []
    for settings in (PlannerSettings(), DRAFTS):
        engine = EngineBuilder(total_blocks=20_000)
        for _ in range(8):
            engine.wait(1500, due_in_s=1.5, tpot_s=0.05)
        view = engine.view(max_num_batched_tokens=16_384)
        planned_tokens.append(Planner(DRAFTER, 2, settings).plan(engine.now_s, view).num_tokens)
    assert planned_tokens[1] == planned_tokens[0] < 8 * 1500


def test_useless_drafts_are_not_made() -> None:
    plan = planned(loaded(), acceptance=0.0)
    assert plan.draft_tokens.sum() == 0


def test_a_request_drafts_no_further_than_its_end() -> None:
    engine = loaded(decodes=40)
    last = engine.decode(output_tokens=98, max_tokens=100, ahead_s=0.0)
    plan = planned(engine)
    assert drafts_of(plan, [last]) == [1]


def test_each_tier_has_its_own_length() -> None:
    engine = EngineBuilder()
    tight = [engine.decode(prompt_tokens=20, tpot_s=0.05, ahead_s=0.045) for _ in range(20)]
    loose = [engine.decode(prompt_tokens=3000, tpot_s=0.1, ahead_s=0.045) for _ in range(20)]
    engine.wait(1500, due_in_s=1.5)
    engine.wait(1500, due_in_s=1.5)
    found = chosen(taught(AcceptanceEstimate(2), 0.7), engine)
    assert found.tpot_s.tolist() == [0.05, 0.1]
    assert len(set(drafts_of(planned(engine), tight))) == 1
    assert len(set(drafts_of(planned(engine), loose))) <= 1


def test_drafts_shrink_when_the_due_decodes_would_be_late() -> None:
    engine = EngineBuilder()
    slots = [engine.decode(prompt_tokens=200, ahead_s=0.09) for _ in range(150)]
    for _ in range(3):
        engine.wait(500, due_in_s=1.5)
    plan = planned(engine, acceptance=0.9)
    assert max(drafts_of(plan, slots)) < 10
    assert plan.predicted_s <= 0.75  # half of the tightest TTFT


def test_long_contexts_do_not_end_drafts() -> None:
    """Reading the contexts takes most of a pace already, but a verification brings what lasts for several."""
    engine = EngineBuilder(total_blocks=20_000)
    slots = [engine.decode(prompt_tokens=3000, tpot_s=0.05, ahead_s=0.2) for _ in range(12)]
    plain = planned(engine, PlannerSettings())
    plan = planned(engine)
    assert 0.035 < plain.predicted_s < 0.05
    assert min(drafts_of(plan, slots)) > 1
    assert plan.predicted_s > 0.05


def test_no_drafts_without_blocks_for_them() -> None:
    engine = EngineBuilder()
    slot = engine.decode(prompt_tokens=310, output_tokens=10, ahead_s=0.01)  # 319 tokens computed, 320 held
    alone = planned(engine, free_blocks=0)
    assert alone.slots.tolist() == [slot]
    assert alone.draft_tokens.tolist() == [0]


def test_without_prompts_the_length_is_that_which_brings_tokens_fastest() -> None:
    engine = EngineBuilder()
    engine.decode(ahead_s=0.09)
    few = planned(engine)
    assert few.draft_tokens.tolist()[0] >= 4
    crowd = EngineBuilder()
    for _ in range(200):
        crowd.decode(prompt_tokens=20, ahead_s=0.09)
    assert planned(crowd).draft_tokens.max() < few.draft_tokens.max()


def test_best_effort_drafts_in_what_is_left_over() -> None:
    engine = EngineBuilder()
    slot = engine.decode(tpot_s=np.inf, status=Status.BEST_EFFORT)
    plan = planned(engine)
    assert plan.reasons.tolist() == [Reason.BEST_EFFORT]
    assert drafts_of(plan, [slot])[0] > 0


def test_lengths_do_not_flap_while_counts_come_and_go() -> None:
    estimate, found = taught(AcceptanceEstimate(2), 0.7), no_drafts()
    lengths = []
    rng = np.random.default_rng(0)
    for step in range(60):
        engine = loaded(int(rng.integers(34, 47)))
        found = chosen(estimate, engine, 0.1 * step, found)
        lengths.append(int(found.tokens[0]))
    changes = sum(a != b for a, b in zip(lengths[1:], lengths[:-1], strict=True))
    assert changes <= 1


def test_a_tier_that_drafts_nothing_is_probed_now_and_then() -> None:
    estimate, found = AcceptanceEstimate(2), no_drafts()
    none = np.zeros(600, dtype=np.int64)
    estimate.observe(none, none + 1, none)  # six hundred drafts, none right
    engine = loaded()
    probes = []
    for step in range(int(2 * PROBE_EVERY_S / 0.1) + 3):
        found = chosen(estimate, engine, 0.1 * step, found)
        probes.append(int(found.tokens[0]))
    assert sorted(set(probes)) == [0, PROBE_TOKENS]
    assert probes.count(PROBE_TOKENS) == 2


@pytest.mark.parametrize("seed", range(20))
def test_any_plan_with_drafts_keeps_the_engines_limits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    engine = EngineBuilder(total_blocks=int(rng.integers(100, 2000)), max_num_seqs=60)
    for _ in range(int(rng.integers(0, 40))):
        status = Status.BEST_EFFORT if rng.random() < 0.3 else Status.ADMITTED
        engine.decode(tpot_s=float(rng.choice([0.05, 0.1])), ahead_s=float(rng.random()) - 0.1, status=status)
    for _ in range(int(rng.integers(0, 4))):
        engine.prefilling(1000, int(rng.integers(1, 900)), due_in_s=float(rng.random()))
    for _ in range(int(rng.integers(0, 20))):
        engine.wait(int(rng.integers(1, 3000)), due_in_s=float(rng.random() * 3))
    most = int(rng.choice([64, 256, 2048]))
    free = int(rng.integers(0, 60)) if rng.random() < 0.5 else None
    view = engine.view(max_num_batched_tokens=most, free_blocks=free)
    held = {slot: -(-int(engine.table.rows["computed_tokens"][slot]) // 16) for slot in engine.running}
    plan = planner_that_knows(PlannerSettings(max_draft_tokens=int(rng.integers(1, 11)))).plan(engine.now_s, view)
    rows = engine.table.rows
    assert plan.num_tokens <= most
    left = rows["prompt_tokens"][plan.slots] + rows["output_tokens"][plan.slots] - rows["computed_tokens"][plan.slots]
    drafting = plan.draft_tokens > 0
    assert (plan.tokens[drafting] == 1 + plan.draft_tokens[drafting]).all()
    assert (left[drafting] == 1).all()
    assert (rows["output_tokens"] + plan_total(plan, len(rows)) <= rows["max_tokens"])[plan.slots].all()
    needed = sum(
        -(-(int(rows["computed_tokens"][slot]) + int(tokens)) // 16) - held.get(int(slot), 0)
        for slot, tokens in zip(plan.slots, plan.tokens, strict=True)
    )
    freed = sum(held[int(slot)] for slot in plan.preempt)
    assert needed <= view.free_blocks + freed


def plan_total(plan: StepPlan, size: int) -> np.ndarray:
    """int64 [size]: most output tokens that each slot gets from the plan."""
    most = np.zeros(size, dtype=np.int64)
    most[plan.slots] = 1 + plan.draft_tokens
    return most
