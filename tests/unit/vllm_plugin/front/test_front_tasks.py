"""Calls of tasks at the front end: what their clients are told, and what a refusal and an end do to the task."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from slos_serve.core.slo import SLO, WhenFull, single_stage
from slos_serve.core.tasks import TaskClass, TaskPromise, with_task
from slos_serve.core.verdict import Verdict
from slos_serve.vllm_plugin.front.answers import verdict_headers
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.explain import explain
from slos_serve.vllm_plugin.front.judged import Judged
from slos_serve.vllm_plugin.front.tasks import WORD_WITHIN_S
from slos_serve.vllm_plugin.slo_args import SloArgs
from tests.unit.routing.fleet import NOW_S, loaded
from tests.unit.vllm_plugin.front.builders import CLASSES, desk

CODER = with_task(single_stage("coder", SLO()), TaskPromise(60_000.0, calls=3))


def enter(front: FrontDesk, name: str, slo_class: TaskClass = CODER, tokens: int = 200, **xargs: object) -> Judged:
    """A call comes; its verdict."""
    judged = front.begin(slo_class)
    params = SimpleNamespace(extra_args={"slo_class": "coder", "session_id": "s", **xargs}, max_tokens=50, n=1)
    front.entered(judged, {"prompt_token_ids": [1] * tokens}, params, name)
    return judged


def end(front: FrontDesk, name: str, output_tokens: int = 20) -> None:
    """The engine says that a request ended."""
    outcome = {"request_id": name, "verdict": "admitted", "finished": "stop", "rank": 0, "output_tokens": output_tokens}
    front.heard(json.dumps(outcome).encode(), is_state=False)


def test_a_call_is_told_its_share_and_what_is_left(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(5))
    told = []
    for number in range(3):
        judged = enter(front, f"cmpl-{number}", slo_last_round=int(number == 2))
        assert judged.answer is not None
        assert judged.answer.verdict is Verdict.ADMITTED
        headers = dict(verdict_headers(judged))
        told.append((headers[b"x-slo-target-e2e-ms"], headers[b"x-slo-task-left-ms"]))
        end(front, f"cmpl-{number}")
    assert told == [(b"20000", b"60000"), (b"30000", b"60000"), (b"60000", b"60000")]
    again = enter(front, "cmpl-9")
    assert again.call is not None
    assert again.call.number == 1, "the last call ended the task"


def test_what_is_left_counts_from_the_stamp_that_the_task_counts_from(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(5))
    judged = front.begin(CODER)
    judged.arrival_s = NOW_S - 0.002  # the middleware saw the request before vLLM stamped it
    params = SimpleNamespace(extra_args={"slo_class": "coder", "session_id": "s"}, max_tokens=50, n=1)
    front.entered(judged, {"prompt_token_ids": [1] * 200}, params, "cmpl-0")
    headers = dict(verdict_headers(judged))
    assert (headers[b"x-slo-target-e2e-ms"], headers[b"x-slo-task-left-ms"]) == (b"20000", b"60000")


def test_a_refused_call_is_not_one_of_the_task(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    strict = with_task(single_stage("strict", SLO(ttft_ms=1.0)), TaskPromise(60_000.0))
    refusing = TaskClass("strict", strict.stages, when_full=WhenFull.REJECT, task=strict.task)
    refused = enter(front, "cmpl-0", refusing, tokens=3000)
    assert refused.refusal is not None
    assert refused.answer is not None
    assert refused.answer.verdict is Verdict.REJECTED
    after = enter(front, "cmpl-1")
    assert after.call is not None
    assert after.call.number == 1


def test_a_call_that_no_engine_had_is_not_under_way_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks at some fields only after the front end has judged: it answers 400, and its engine hears nothing."""
    front = desk(tmp_path, loaded(5))
    refused = enter(front, "cmpl-0")
    front.ended(refused)
    monkeypatch.setattr(front, "_clock_s", lambda: NOW_S + WORD_WITHIN_S + 1.0)
    after = enter(front, "cmpl-1")
    assert after.call is not None
    assert (after.call.number, after.call.task_due_s) == (1, NOW_S + WORD_WITHIN_S + 61.0), "it takes none of the time"
    front.ended(after)
    end(front, "cmpl-1")
    again = enter(front, "cmpl-2")
    assert again.call is not None and again.call.number == 2, "the engine told of that one"


def test_the_first_call_of_a_task_can_be_asked_about(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(5))
    (tmp_path / "classes.yaml").write_text(f"{CLASSES}  coder: {{task_ms: 60000, task_calls: 3}}\n", encoding="utf-8")
    front.look_at_file(NOW_S + 100.0)
    if "coder" not in front.version.classes.classes:  # it waits until a changed file has settled
        front.look_at_file(NOW_S + 200.0)
    found = explain(front, SloArgs(slo_class="coder"), 200, 100)
    assert (found.slo_class, found.verdict) == ("coder", "admitted")
    with pytest.raises(Exception, match="session_id"):
        SloArgs(slo_class="coder").applied(front.version.classes)
