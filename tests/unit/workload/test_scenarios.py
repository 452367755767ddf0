"""Scenarios: lengths near their source, links between rounds, promises bound to a batch-time model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.core.tasks import task_of
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.outcome import summarize_run
from slos_serve.workload.lengths import length_table, load_table
from slos_serve.workload.prefixes import cached_at_best
from slos_serve.workload.scenarios import SCENARIOS, make_workload, trace_workload

MODEL = BatchTimeModel(k_c_s=1e-4, b_c_s=8e-3, k_m_s=4e-5, b_m_s=20e-3, k_q_s=7e-9)


@pytest.mark.parametrize("name", ["azure_conv_lengths", "azure_code_lengths", "arxiv_lengths", "reasoning_lengths"])
def test_tables_keep_the_means(name: str) -> None:
    drawn = length_table(name).draw(200_000, np.random.default_rng(0))
    for column, mean in load_table(name)["mean"].items():
        assert drawn[column].mean() == pytest.approx(mean, rel=0.03)
        assert drawn[column].min() >= 1


def test_rank_correlations_are_kept() -> None:
    drawn = length_table("reasoning_lengths").draw(100_000, np.random.default_rng(0))
    ranks = [np.argsort(np.argsort(column)) for column in drawn.values()]
    np.testing.assert_allclose(np.corrcoef(ranks), load_table("reasoning_lengths")["rank_correlation"], atol=0.05)


DEADLINES = ("agents", "answers", "batch-with-deadline", "compound", "tiers")
TASKS = ("agents", "compound")


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_every_scenario_is_well_formed(scenario: str) -> None:
    workload = make_workload(scenario, 2.0, 300, seed=3)
    calls = workload.calls
    assert workload.num_requests == 300
    assert len(workload.request_arrivals_s) == 300
    assert np.all(calls["prompt_tokens"] >= 1) and np.all(calls["output_tokens"] >= 1)
    assert np.all(calls["output_tokens"] <= calls["max_tokens"])
    assert np.all((calls["first_stage_tokens"] >= 1) & (calls["first_stage_tokens"] <= calls["output_tokens"]))
    assert calls["class_index"].max() < len(workload.classes)
    bound = workload.bound(MODEL).calls
    complete = np.isfinite(bound["e2e_s"])
    tasks = np.array([task_of(one) is not None for one in workload.classes])[calls["class_index"]]
    assert np.all(bound["ttft_s"] >= 0.2) and np.all(bound["tpot_s"][~complete & ~tasks] <= 0.1)
    assert tasks.any() == (scenario in TASKS)
    assert np.all(np.isinf(bound["tpot_s"][complete])) and complete.any() == (scenario in DEADLINES)


def test_a_user_wants_every_answer_at_its_own_speed() -> None:
    load = make_workload("users", 1.0, 400, seed=2)
    calls = load.calls
    for session in range(40):
        own = calls[calls["session"] == session]
        assert 7 <= len(own) <= 20
        assert len(set(own["class_index"])) == 1
        assert np.all(np.diff(own["prompt_tokens"]) > 0)  # each prompt holds all before it
    assert [one.stages[0].slo.tpot_ms for one in load.classes] == pytest.approx([1000.0 / 30.0, 10.0])


def test_compound_tasks_are_promised_eight_seconds_a_call() -> None:
    load = make_workload("compound", 1.0, 900, seed=2)
    first = load.calls[np.isfinite(load.calls["arrival_s"])]
    rounds = np.bincount(load.calls["session"])[first["session"]]
    promises = [task_of(load.classes[index]) for index in first["class_index"]]
    tasks = [(int(calls), promise.task_s) for calls, promise in zip(rounds, promises, strict=True) if promise]
    assert set(tasks) == {(calls, 8.0 * calls) for calls in range(2, 7)}
    assert 250 < len(tasks) < 350 and all(rounds[index] == 1 for index, one in enumerate(promises) if one is None)


def test_same_seed_same_requests_at_every_rate() -> None:
    slow, fast = make_workload("mixed", 1.0, 100, seed=5).calls, make_workload("mixed", 3.0, 100, seed=5).calls
    for name in ("prompt_tokens", "output_tokens", "class_index"):
        np.testing.assert_array_equal(slow[name], fast[name])
    np.testing.assert_allclose(slow["arrival_s"], 3.0 * fast["arrival_s"])


def test_tool_rounds_grow_from_what_came_before() -> None:
    calls = make_workload("tool", 1.0, 50, seed=1).calls
    for i in np.flatnonzero(calls["next_call"] >= 0):
        following = calls[calls["next_call"][i]]
        assert following["session"] == calls["session"][i]
        assert np.isinf(following["arrival_s"]) and following["tool_s"] > 0.0
        assert following["prompt_tokens"] > calls["prompt_tokens"][i] + calls["output_tokens"][i]
    rounds = np.bincount(calls["session"])
    assert set(rounds) == {3, 4}


def test_slowdown_floor_and_own_numbers(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(
        "Timestamp,Request tokens,Response tokens,slo_class,ttft_ms,tpot_ms\n"
        "0,10,5,a,,\n1,10000,5,a,,\n2,10,5,a,700,30\n"
    )
    classes = ClassSet({"a": single_stage("a", SLO(ttft_slowdown=2.0, tpot_ms=80.0))})
    calls = trace_workload(file, classes).bound(MODEL).calls
    assert calls["ttft_s"][0] == pytest.approx(0.2)  # the floor
    assert calls["ttft_s"][1] == pytest.approx(2.0 * MODEL.zero_load_s(10000))
    assert calls["ttft_s"][2] == pytest.approx(0.7)
    np.testing.assert_allclose(calls["tpot_s"], [0.08, 0.08, 0.03])


def test_unknown_names_come_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(InvalidFieldError, match=r"one of .*'chat'"):
        make_workload("chatt", 1.0, 10)
    file = tmp_path / "t.csv"
    file.write_text("Timestamp,Request tokens,Response tokens,slo_class\n0,10,5,gold\n")
    with pytest.raises(InvalidFieldError, match=r"t\.csv:2: slo_class: got 'gold'"):
        trace_workload(file)


def test_long_contexts_are_those_of_the_published_trace() -> None:
    """Mooncake's conversations: 12,035 and 343 tokens, 40 % of the prompt tokens cached at best."""
    prompts, outputs, cached = [], [], []
    for seed in range(3):
        load = make_workload("long", 1.0, 12_000, seed)
        prompts.append(load.calls["prompt_tokens"])
        outputs.append(load.calls["output_tokens"])
        cached.append(cached_at_best(load.prefixes, load.calls["prompt_tokens"], 16).sum())
    assert np.mean(prompts) == pytest.approx(12_035, rel=0.05)
    assert np.mean(outputs) == pytest.approx(343, rel=0.05)
    assert np.sum(cached) / np.sum(prompts) == pytest.approx(0.40, rel=0.05)
    assert np.min(prompts) >= 1000 and 100_000 < np.max(prompts) <= 128_000


def test_a_trace_shares_by_its_hashes_or_else_by_its_sessions(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    row = '{"timestamp": %d, "input_length": %d, "output_length": 5%s}\n'
    hashes = [f', "hash_ids": {ids}' for ids in ([1, 2], [1, 3])]
    file.write_text(row % (1, 1000, hashes[0]) + row % (2, 1000, hashes[1]))
    assert trace_workload(file).prefixes.path(1).tolist() == [0]
    sessions = [', "session_id": "a"', ', "session_id": "b"', ', "session_id": "a"']
    file.write_text("".join(row % (i, 100 * i, session) for i, session in enumerate(sessions, start=1)))
    prefixes = trace_workload(file).prefixes
    assert [prefixes.path(call).tolist() for call in range(3)] == [[], [], [0]]


def test_a_trace_with_tasks_is_linked_and_scored_as_tasks(tmp_path: Path) -> None:
    file = tmp_path / "tasks.csv"
    file.write_text(
        "Timestamp,Request tokens,Response tokens,session,pause_ms,e2e_ms,task_ms\n"
        "0,200,20,a,,,60000\n1,300,30,b,,8000,\n2,400,25,a,1500,,\n3,500,40,a,0,,\n4,100,20,c,,,100.5\n"
    )
    workload = trace_workload(file, ClassSet({"free": single_stage("free", SLO())}, "free"))
    calls = workload.bound(MODEL).calls
    assert calls["session"].tolist() == [0, 1, 0, 0, 2]
    assert calls["next_call"].tolist() == [2, -1, 3, -1, -1]
    assert calls["arrival_s"].tolist() == [0.0, 1.0, np.inf, np.inf, 4.0]
    assert calls["tool_s"].tolist() == [0.0, 0.0, 1.5, 0.0, 0.0]
    assert calls["e2e_s"][1] == 8.0
    names = [workload.classes[index].name for index in calls["class_index"]]
    first, last = "free-task-60000ms", "free-task-100.5ms"
    assert names == [first, "free", first, first, last]
    limits = EngineLimits(kv_capacity_tokens=64_000)
    outcome = summarize_run(simulate(workload.bound(MODEL), MODEL, limits, SimSettings()))
    assert (outcome.requests, outcome.attained) == (3, 2)
    assert outcome.by_class[last] == 0.0
