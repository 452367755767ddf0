"""The story of agents: what is sent, how whole tasks are scored, and what is claimed."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from slos_serve.bench.agents_plan import ANSWER, CHAT, TASK, TASK_CALLS, agents_yaml, plan_agents
from slos_serve.bench.agents_report import agents_claims, agents_json, agents_table, units_of
from slos_serve.bench.demo_plan import DemoPlan, DemoSettings
from slos_serve.bench.demo_report import OURS, STOCK
from slos_serve.bench.requests import BenchRequest
from slos_serve.bench.scoring import score_tasks
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.core.tasks import TaskPromise, task_of, with_task
from slos_serve.files.class_file import parse_classes
from slos_serve.metrics.summary import Outcome
from tests.unit.bench.builders import MODEL, agents_side, answered, calls_of, response_of


def plan(seed: int = 0) -> DemoPlan:
    return plan_agents(MODEL, DemoSettings(seed=seed, calm_s=30.0, burst_s=30.0))


def test_a_seed_fixes_what_is_sent_and_the_mix_has_all_kinds() -> None:
    assert plan(1).burst == plan(1).burst != plan(2).burst
    kinds = [request.slo_class for request in plan().burst]
    assert {CHAT, ANSWER, TASK} == set(kinds)
    assert 0.2 < kinds.count(TASK) / len(kinds) < 0.5


def test_calls_of_a_task_follow_each_other_and_only_the_last_says_so() -> None:
    for first in [request for request in plan().burst if request.slo_class == TASK]:
        calls = calls_of(first)
        assert TASK_CALLS[0] <= len(calls) <= TASK_CALLS[1]
        assert len({call.request_id for call in calls}) == len(calls)
        assert {call.session for call in calls} == {first.session}
        assert [call.last_call for call in calls] == [False] * (len(calls) - 1) + [True]
        for before, after in pairwise(calls):
            assert after.prompt.startswith(before.prompt)
            assert len(after.prompt) > len(before.prompt)


def test_promises_scale_with_the_engine_and_the_class_file_says_them() -> None:
    slow, fast = plan(), plan_agents(MODEL.scaled(0.25), DemoSettings())
    read = parse_classes(agents_yaml(slow.classes), "story").classes
    assert read == slow.classes.classes
    assert read[ANSWER].slo.e2e_s == pytest.approx(4.0 * fast.classes.classes[ANSWER].slo.e2e_s, rel=0.01)
    task, fast_task = task_of(read[TASK]), task_of(fast.classes.classes[TASK])
    assert task is not None
    assert fast_task is not None
    assert fast_task.task_ms < task.task_ms < 4.0 * fast_task.task_ms  # pauses do not scale


TASKS = ClassSet(
    {
        "count": with_task(single_stage("count", SLO()), TaskPromise(10_000.0)),
        "free": with_task(single_stage("free", SLO()), TaskPromise(10_000.0, pauses_count=False)),
    }
)


@pytest.mark.parametrize(("slo_class", "kept", "spent_s"), [("count", False, 14.0), ("free", True, 8.0)])
def test_a_task_is_scored_by_the_end_of_its_last_answer(slo_class: str, kept: bool, spent_s: float) -> None:
    calls = [BenchRequest(f"c{n}", 5.0 * n, "Hi", 10, slo_class, session="s", last_call=n == 2) for n in range(3)]
    several = [response_of(call, ttft_s=2.0, gap_s=(2.0 if call.last_call else 0.0) / 9) for call in calls]
    (score,) = score_tasks(several, TASKS).values()
    assert (score.calls, score.kept) == (3, kept)
    assert score.spent_s == pytest.approx(spent_s)


def test_a_task_that_breaks_off_is_not_kept() -> None:
    first = next(request for request in plan().burst if request.slo_class == TASK)
    several = answered(first, 0.1)
    assert score_tasks(several, plan().classes)[str(first.session)].kept
    assert not score_tasks(several[:-1], plan().classes)[str(first.session)].kept
    failed = [*several[:-1], response_of(several[-1].request, outcome=Outcome.ERROR)]
    assert not score_tasks(failed, plan().classes)[str(first.session)].kept


def test_the_result_counts_what_users_wait_for() -> None:
    given = plan()
    loads = {STOCK: agents_side(given, 20), OURS: agents_side(given, 40)}
    result = agents_json(loads, given, MODEL, {"seed": 0})
    json.dumps(result)
    waited = [request for request in given.burst if request.slo_class != CHAT]
    early = {20: 0, 40: 0}
    for limit in early:
        early[limit] = sum(request.slo_class != CHAT for request in given.burst[:limit])
    assert sum(result[OURS]["burst"]["count"][kind] for kind in (ANSWER, TASK)) == len(waited)
    assert result["ratio"] == early[40] / early[20]
    assert result["calm_time_ratio"] == pytest.approx(1.0)
    assert all(held for _, held in agents_claims(result))
    assert agents_table(result).row_count == 6
    worse = agents_claims(agents_json({STOCK: loads[OURS], OURS: loads[STOCK]}, given, MODEL, {}))
    assert [held for _, held in worse] == [False, False, True, True]
    assert len(units_of(loads[OURS]["burst"], given, MODEL)) == len(given.burst)
