"""The deadline of a complete answer becomes a due first token and a pace."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.plan import Reason
from slos_serve.core.request import Status
from slos_serve.perf.lengths import LengthForecast
from slos_serve.perf.step_time import alone_s
from slos_serve.planning.deadlines import (
    LATE_SHARE,
    LEAST_SPARE,
    SHORTEST_PACE,
    SHORTEST_STEP,
    WAIT_OF_SPARE,
    is_late,
    pace_answers,
)
from slos_serve.planning.demand import is_lost
from slos_serve.planning.planner import Planner
from slos_serve.planning.state import FIRST_LEAD, next_due_s
from tests.builders import OPT_13B_A100, EngineBuilder, planned, reason_of

TOKEN_S = alone_s(OPT_13B_A100.coefficients, 1.0, 0.0)


def lengths_of(tokens: int) -> np.ndarray:
    """Survival of a class whose answers have about that many tokens, and nobody else's."""
    forecast = LengthForecast(2, 0.7)
    for _ in range(2000):
        forecast.observe(0, tokens)
    return forecast.survival()


def waiting(engine: EngineBuilder, within_s: float, expected: int = 100, waited_s: float = 0.0) -> int:
    """A request of which nothing but the complete answer is promised, ``within_s`` of its arrival."""
    slot = engine.wait(200, due_in_s=np.inf, tpot_s=np.inf, max_tokens=2000, waited_s=waited_s)
    rows = engine.table.rows
    rows["answer_due_s"][slot] = engine.now_s - waited_s + within_s
    rows["status"][slot], rows["has_slo"][slot], rows["expected_tokens"][slot] = Status.UNDECIDED, 1, expected
    return slot


def decoding(engine: EngineBuilder, due_in_s: float, left: int) -> int:
    """A promised decode with a deadline and nothing else."""
    slot = engine.decode(output_tokens=10, tpot_s=np.inf, max_tokens=2000)
    engine.table.rows["answer_due_s"][slot] = engine.now_s + due_in_s
    engine.table.rows["expected_tokens"][slot] = 10 + left
    return slot


def test_the_first_token_is_due_when_a_share_of_the_time_to_spare_has_passed() -> None:
    engine = EngineBuilder()
    slot, alone = waiting(engine, within_s=100.0), alone_s(OPT_13B_A100.coefficients, 200.0, 0.0)
    pace_answers(engine.state(), lengths_of(100))
    row, spare_s = engine.table.rows[slot], 100.0 - alone - 100 * TOKEN_S
    first_s = alone + WAIT_OF_SPARE * spare_s
    assert row["ttft_due_s"] - engine.now_s == pytest.approx(first_s)
    assert row["tpot_s"] == pytest.approx((100.0 - first_s) / 100)
    assert row["promised_ttft_due_s"] == row["promised_tpot_s"] == np.inf


def test_who_has_waited_longer_gets_a_share_of_what_is_left() -> None:
    engine = EngineBuilder()
    slot, alone = waiting(engine, within_s=100.0, waited_s=80.0), alone_s(OPT_13B_A100.coefficients, 200.0, 0.0)
    pace_answers(engine.state(), lengths_of(100))
    spare_s = 20.0 - alone - 100 * TOKEN_S
    assert engine.table.rows["ttft_due_s"][slot] - engine.now_s == pytest.approx(alone + WAIT_OF_SPARE * spare_s)


@pytest.mark.parametrize("needed", [2.0, 5.0, 20.0])
def test_admission_reckons_with_a_shorter_pace_than_steps_are_cut_short_for(needed: float) -> None:
    engine = EngineBuilder()
    slot = waiting(engine, within_s=100 * needed * TOKEN_S)
    row = engine.table.rows[slot]
    row["output_tokens"], row["last_token_s"] = 1, engine.now_s
    row["expected_tokens"] = 101
    pace_answers(engine.state(), lengths_of(101))
    row = engine.table.rows[slot]
    assert row["tpot_s"] == pytest.approx(max(needed, SHORTEST_PACE) * TOKEN_S, rel=0.02)
    assert row["step_pace_s"] == pytest.approx(max(needed, SHORTEST_STEP) * TOKEN_S, rel=0.02)
    assert not is_lost(engine.state(), slot)


def test_no_more_answers_are_promised_than_can_be_decoded_in_time() -> None:
    """A pace of a loaded engine let in any number: on a fast one 500 of 500 were promised and 44 were kept."""
    engine = EngineBuilder()
    for _ in range(200):
        waiting(engine, within_s=100 * 4.0 * TOKEN_S)
    taken = Planner(OPT_13B_A100, 2).ask_now(engine.state()).admitted.taken
    assert 0 < taken.sum() < 100


def test_a_prompt_may_wait_a_little_however_long_the_answer() -> None:
    """Due the moment it can be computed, it would fit beside nobody."""
    engine = EngineBuilder()
    slot, alone = waiting(engine, within_s=8.0, expected=500), alone_s(OPT_13B_A100.coefficients, 200.0, 0.0)
    pace_answers(engine.state(), lengths_of(100))
    waits_s = WAIT_OF_SPARE * LEAST_SPARE * (8.0 - alone)
    assert engine.table.rows["ttft_due_s"][slot] - engine.now_s == pytest.approx(alone + waits_s)


def test_other_promises_hold_beside_it() -> None:
    engine = EngineBuilder()
    slot = engine.wait(200, due_in_s=1.0, tpot_s=0.05)
    engine.table.rows["answer_due_s"][slot] = engine.now_s + 100.0
    pace_answers(engine.state(), lengths_of(100))
    assert engine.table.rows["ttft_due_s"][slot] == engine.now_s + 1.0
    assert engine.table.rows["tpot_s"][slot] == 0.05


def test_the_pace_is_drawn_anew_and_no_lead_is_saved() -> None:
    engine = EngineBuilder()
    slot = decoding(engine, due_in_s=60.0, left=100)
    last_s = engine.table.rows["last_token_s"][slot]
    for left in (100, 200):
        engine.table.rows["expected_tokens"][slot] = 10 + left
        pace_answers(engine.state(), lengths_of(400))
        pace_s = engine.table.rows["tpot_s"][slot]
        assert pace_s == pytest.approx((engine.now_s + 60.0 - last_s) / left)
        # A stage that is far ahead of its even line, or far behind it, is due all the same.
        for begun_s in (0.1, 1000.0):
            engine.table.rows["stage_start_s"][slot] = engine.now_s - begun_s
            assert next_due_s(engine.table.rows, slot, 0.0) == pytest.approx(last_s + pace_s)


def test_a_tpot_promised_beside_a_deadline_is_due_by_its_own_line() -> None:
    engine = EngineBuilder()
    slot = decoding(engine, due_in_s=600.0, left=100)
    rows = engine.table.rows
    rows["promised_tpot_s"][slot], rows["stage_tokens"][slot] = 0.1, 40
    rows["stage_start_s"][slot] = engine.now_s - 3.95
    pace_answers(engine.state(), lengths_of(400))
    assert next_due_s(rows, slot, 0.0) == pytest.approx(engine.now_s + 0.05 - 0.1 * FIRST_LEAD)


def test_an_answer_behind_its_even_line_leaves_steps_to_prompts() -> None:
    """One deadline whose pace grew tight used to shorten every step to nothing until it was given up."""
    engine = EngineBuilder()
    slot = decoding(engine, due_in_s=5.0, left=100)
    engine.table.rows["stage_start_s"][slot] = engine.now_s - 60.0
    prompt = engine.wait(2000, due_in_s=3.0, tpot_s=0.1)
    plan = planned(engine)
    assert prompt in plan.slots and plan.tokens[plan.slots == prompt].item() > 500


def test_a_deadline_that_most_answers_would_miss_is_given_up() -> None:
    engine = EngineBuilder()
    waits, runs = waiting(engine, within_s=50 * TOKEN_S), decoding(engine, due_in_s=50 * TOKEN_S, left=90)
    survival = lengths_of(100)
    pace_answers(engine.state(), survival)
    assert is_lost(engine.state(), waits) and is_lost(engine.state(), runs)
    engine.table.rows["hint_tokens"][[waits, runs]] = 20, 40  # their clients know better
    pace_answers(engine.state(), survival)
    assert not is_lost(engine.state(), waits) and not is_lost(engine.state(), runs)


@pytest.mark.parametrize(("share", "late"), [(LATE_SHARE - 0.1, False), (LATE_SHARE + 0.05, True)])
def test_it_is_late_by_the_share_of_answers_that_would_be(share: float, late: bool) -> None:
    engine, forecast = EngineBuilder(), LengthForecast(2, 0.7)
    for number in range(2000):
        forecast.observe(0, 400 if number % 100 < 100 * share else 20)
    slot = waiting(engine, within_s=100 * TOKEN_S)
    assert is_late(engine.state(), slot, forecast.survival()[0]) is late


def test_a_deadline_that_has_passed_is_lost() -> None:
    engine = EngineBuilder()
    slot = waiting(engine, within_s=10.0, waited_s=10.5)
    pace_answers(engine.state(), lengths_of(100))
    assert is_lost(engine.state(), slot)


def test_it_is_promised_and_served_beside_other_promises() -> None:
    engine = EngineBuilder()
    urgent, patient = engine.wait(500, due_in_s=1.0), waiting(engine, within_s=120.0)
    plan = planned(engine)
    assert reason_of(plan, urgent) == Reason.PREFILL_DEADLINE
    assert {urgent, patient} == set(plan.admitted.tolist())


def test_a_demoted_one_goes_on_without_a_promise() -> None:
    engine = EngineBuilder()
    slot = decoding(engine, due_in_s=-0.1, left=50)
    planner = Planner(OPT_13B_A100, 2)
    view = engine.view()
    plan = planner.plan(engine.now_s, view)
    planner.commit(plan, view, plan.slots)
    assert plan.demoted.tolist() == [slot] and plan.slots.tolist() == [slot]
    assert engine.table.rows["status"][slot] == Status.BEST_EFFORT
