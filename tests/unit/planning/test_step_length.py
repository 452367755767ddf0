"""When a step may last beyond the earliest due time."""

from __future__ import annotations

import pytest

from slos_serve.core.plan import StepPlan
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from tests.builders import OPT_13B_A100, EngineBuilder


def _planned(due_in_s: float, decodes_done: int = 60, decodes: int = 40) -> tuple[EngineBuilder, int, StepPlan]:
    """Decodes due in 90 ms that can lend 5 ms, and a promised prompt of which a little more is left than fits."""
    engine = EngineBuilder(total_blocks=20_000)
    for _ in range(decodes):
        engine.decode(output_tokens=decodes_done, max_tokens=100, ahead_s=0.090)
    # Another prompt keeps the first from being the only one.
    prompt = engine.prefilling(3000, 2430, due_in_s=due_in_s)
    engine.prefilling(3000, 100, due_in_s=3.0)
    return engine, prompt, Planner(OPT_13B_A100, 2, PlannerSettings()).plan(engine.now_s, engine.view())


def _tokens_of(plan: StepPlan, slot: int) -> int:
    return int(plan.tokens[plan.slots == slot].sum())


def test_decodes_lend_their_margin_to_a_prompt_that_no_later_step_would_end_in_time() -> None:
    _, prompt, plan = _planned(due_in_s=0.120)
    assert _tokens_of(plan, prompt) == 570
    assert 0.090 < plan.predicted_s < 0.120


def test_nothing_is_lent_where_the_next_step_is_early_enough() -> None:
    _, prompt, plan = _planned(due_in_s=0.4)
    assert _tokens_of(plan, prompt) < 570
    assert plan.predicted_s <= 0.0901


def test_nothing_is_lent_to_a_prompt_that_would_be_late_all_the_same() -> None:
    _, _, plan = _planned(due_in_s=0.095)
    assert plan.predicted_s <= 0.0951


def test_nobody_lends_more_than_can_be_caught_up() -> None:
    # About to end: two tokens are left to make up for it.
    engine, prompt, _ = _planned(due_in_s=0.120)
    for slot in engine.running[:3]:
        engine.table.rows["stage_start_s"][slot] -= 0.100  # their margin is used up
        engine.table.rows["output_tokens"][slot] = 98
        engine.table.rows["hint_tokens"][slot] = 100
    plan = Planner(OPT_13B_A100, 2, PlannerSettings()).plan(engine.now_s, engine.view())
    assert _tokens_of(plan, prompt) < 570
    assert plan.predicted_s == pytest.approx(0.0, abs=0.0901)
