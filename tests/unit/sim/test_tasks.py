"""Whole tasks in virtual time: calls follow each other, are due by their task, and the task is scored once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slos_serve.core.slo import SLO, single_stage
from slos_serve.core.tasks import TaskPromise, task_of, with_task
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.outcome import score, summarize_run
from slos_serve.sim.tasks import SimTasks, call_targets_s
from slos_serve.workload.agents import LOOKUP, LOOKUP_CALLS, RESEARCH, RESEARCH_CALLS
from slos_serve.workload.calls import Workload, empty_calls
from slos_serve.workload.scenarios import make_workload
from tests.builders import OPT_13B_A100

LIMITS = EngineLimits(kv_capacity_tokens=64_000)


def one_task(task_ms: float, *, pauses_count: bool, calls: int = 3, pause_s: float = 4.0) -> Workload:
    """One task of equal calls of about a second each."""
    rows = empty_calls(calls)
    rows["prompt_tokens"], rows["output_tokens"], rows["max_tokens"] = 100, 40, 64
    rows["first_stage_tokens"] = 40
    rows["session"] = 0
    rows["next_call"] = [*range(1, calls), -1]
    rows["arrival_s"] = [0.0, *[np.inf] * (calls - 1)]
    rows["tool_s"] = [0.0, *[pause_s] * (calls - 1)]
    slo_class = with_task(single_stage("task", SLO()), TaskPromise(task_ms, pauses_count=pauses_count))
    return Workload("one", (slo_class,), rows)


@pytest.mark.parametrize(
    ("task_ms", "pauses_count", "kept"),
    [(20_000.0, True, 1), (9000.0, True, 0), (9000.0, False, 1), (1500.0, False, 0)],
)
def test_a_task_is_kept_by_its_last_answer_and_by_its_clock(task_ms: float, pauses_count: bool, kept: int) -> None:
    recording = simulate(one_task(task_ms, pauses_count=pauses_count), OPT_13B_A100, LIMITS, SimSettings())
    outcome = summarize_run(recording)
    assert (outcome.requests, outcome.attained) == (1, kept)
    done_s, arrival_s = recording.calls["done_s"], recording.calls["arrival_s"]
    spent_s = done_s[-1] - arrival_s[0] if pauses_count else float((done_s - arrival_s).sum())
    assert (spent_s <= task_ms / 1000.0) == bool(kept)
    assert call_targets_s(recording)[0] == task_ms / 1000.0
    assert score(recording).attained[0] or task_ms < 2000.0


def test_a_call_is_due_once_whoever_asks() -> None:
    recording = simulate(one_task(20_000.0, pauses_count=True), OPT_13B_A100, LIMITS, SimSettings())
    tasks = SimTasks(recording, OPT_13B_A100)
    first = tasks.begin(0, 5.0)
    assert first is not None
    assert tasks.begin(0, 6.0) is first
    tasks.ended(0, 7.0, whole=True)
    second = tasks.begin(1, 8.0)
    assert second is not None
    assert (second.number, second.task_due_s) == (2, 25.0)


def test_the_scenario_has_a_third_of_each_kind_and_tasks_of_three_to_twenty_calls() -> None:
    load = make_workload("agents", 1.0, 600, seed=3)
    calls = load.calls
    first = calls[np.isfinite(calls["arrival_s"])]
    assert len(first) == load.num_requests == 600
    tasks = np.array([task_of(one) is not None for one in load.classes])
    assert 0.27 < tasks[first["class_index"]].mean() < 0.40
    lengths = np.bincount(calls["session"])
    for slo_class, (least, most) in ((LOOKUP, LOOKUP_CALLS), (RESEARCH, RESEARCH_CALLS)):
        sessions = first["session"][first["class_index"] == load.classes.index(slo_class)]
        assert (lengths[sessions].min(), lengths[sessions].max()) == (least, most)
    follows = calls["next_call"][calls["next_call"] >= 0]
    before = np.flatnonzero(calls["next_call"] >= 0)
    assert (calls["session"][follows] == calls["session"][before]).all()
    assert (calls["prompt_tokens"][follows] > calls["prompt_tokens"][before]).all()
    assert np.isinf(calls["arrival_s"][follows]).all()


def test_deadlines_of_tasks_are_planned_for() -> None:
    """With the tasks' deadlines more tasks are kept than where the planner knows of none."""
    load = make_workload("agents", 0.8, 150, seed=3)
    known = simulate(load, OPT_13B_A100, LIMITS, SimSettings())
    blind = replace(
        load,
        classes=tuple(single_stage(one.name, SLO(e2e_ms=8.64e7) if task_of(one) else one.slo) for one in load.classes),
    )
    unknown = simulate(blind, OPT_13B_A100, LIMITS, SimSettings())
    kept = {}
    for name, recording in (("known", known), ("unknown", unknown)):
        targets_s = call_targets_s(replace(recording, workload=replace(recording.workload, classes=load.classes)))
        tasks = np.isfinite(targets_s) & (load.calls["next_call"] < 0)
        took_s = recording.calls["done_s"] - recording.calls["arrival_s"]
        kept[name] = int((took_s[tasks] <= targets_s[tasks]).sum())
    assert kept["known"] > 1.2 * kept["unknown"], kept


def test_many_replicas_share_one_book() -> None:
    load = make_workload("agents", 1.6, 120, seed=3)
    settings = SimSettings(replicas=2, router="slo")
    outcome = summarize_run(simulate(load, OPT_13B_A100, LIMITS, settings))
    assert outcome.attainment > 0.6
