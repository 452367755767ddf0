"""Requests of a trace for a server: arrivals, promises, and calls that wait for the answer before them."""

from __future__ import annotations

from slos_serve.bench.requests import BenchRequest
from slos_serve.bench.trace_load import WordsPerToken, requests_from_trace, trace_window
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.workload.trace_files import TraceRequest

CLASSES = ClassSet({"free": single_stage("free", SLO())}, "free")
WORDS = WordsPerToken(0.0, 1.0)
TRACE = [
    TraceRequest(0.0, 200, 20, session="a", task_ms=60_000.0),
    TraceRequest(1.0, 300, 30, session="b", e2e_ms=8000.0),
    TraceRequest(2.0, 400, 25, session="a", pause_ms=1500.0),
    TraceRequest(30.0, 500, 40, session="a", pause_ms=0.0),
    TraceRequest(31.0, 100, 10),
]


def made(trace: list[TraceRequest], duration_s: float | None = None) -> list[BenchRequest]:
    return requests_from_trace(trace_window(trace, None, duration_s), CLASSES, WORDS, seed=0)


def test_calls_of_a_task_follow_one_another() -> None:
    task, answer, free = made(TRACE)
    assert (answer.e2e_ms, answer.session, answer.task_ms, answer.then) == (8000.0, None, None, None)
    assert (free.arrival_s, free.session, free.then) == (31.0, None, None)
    pauses, calls = [], [task]
    while calls[-1].then is not None:
        pauses.append(calls[-1].then.pause_s)
        calls.append(calls[-1].then.request)
    assert pauses == [1.5, 0.0]
    assert [call.max_tokens for call in calls] == [20, 25, 40]
    assert [call.last_call for call in calls] == [False, False, True]
    assert {(call.session, call.task_ms) for call in calls} == {("a", 60_000.0)}
    assert len({call.request_id for call in (*calls, answer, free)}) == 5


def test_a_task_that_has_begun_is_sent_to_its_end() -> None:
    sent = made(TRACE, duration_s=0.5)
    assert len(sent) == 1 and sent[0].then is not None and sent[0].then.request.then is not None
    assert len(made(TRACE, duration_s=5.0)) == 2


def test_a_task_of_one_call_names_its_session() -> None:
    (only,) = made([TraceRequest(0.0, 200, 20, session="a", task_ms=60_000.0)])
    assert (only.session, only.task_ms, only.last_call, only.then) == ("a", 60_000.0, True, None)
