"""When calls of a task are due, what tasks teach, and how many are kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, single_stage
from slos_serve.core.tasks import TaskPromise, task_applied, task_of, with_task
from slos_serve.perf.tasks import (
    IDLE_S,
    LEAST_TASKS,
    MOST_LATE_WEIGHT,
    PRIOR_CALLS,
    CallAsked,
    CallDue,
    TaskBook,
    TaskEnded,
    TaskKey,
)

TEN_S = TaskPromise(10_000.0)


def alone_s(tokens: int) -> float:
    return 0.001 + 0.00001 * tokens


def key(session: str = "s", tenant: str = "") -> TaskKey:
    return TaskKey(tenant, session)


def call(at_s: float, task: TaskPromise = TEN_S, prompt_tokens: int = 100, hint_tokens: int = 0) -> CallAsked:
    return CallAsked(task, 0, at_s, prompt_tokens, max_tokens=1000, hint_tokens=hint_tokens)


def serve(
    book: TaskBook,
    at_s: float,
    took_s: float,
    name: TaskKey,
    *,
    last: bool = False,
    task: TaskPromise = TEN_S,
    tokens: int = 50,
    finished: bool = True,
    promised: bool = True,
) -> tuple[CallDue, TaskEnded | None]:
    due, _ = book.begin(name, call(at_s, task))
    return due, book.call_ended(due, at_s + took_s, tokens, finished=finished, promised=promised, last=last)


def teach(book: TaskBook, calls: int, pause_s: float = 1.0, count: int = LEAST_TASKS) -> None:
    """Tasks of so many equal calls end."""
    for number in range(count):
        for position in range(calls):
            serve(book, position * (0.5 + pause_s), 0.5, key(f"taught {number}"), last=position == calls - 1)


def test_a_call_may_take_one_of_the_calls_that_its_client_expects() -> None:
    book, task = TaskBook(alone_s), TaskPromise(10_000.0, calls=4)
    first, _ = serve(book, 100.0, 1.0, key(), task=task)
    second, _ = serve(book, 102.0, 1.0, key(), task=task)
    assert (first.number, second.number) == (1, 2)
    assert first.due_s == pytest.approx(100.0 + 10.0 / 4)
    assert second.due_s == pytest.approx(102.0 + 8.0 / 3)
    assert first.task_due_s == second.task_due_s == pytest.approx(110.0)


def test_the_call_that_is_marked_as_the_last_may_take_all_that_is_left() -> None:
    book = TaskBook(alone_s)
    serve(book, 0.0, 1.0, key())
    assert book.due(key(), replace(call(4.0), last=True)).due_s == pytest.approx(10.0)


def test_pauses_count_or_do_not() -> None:
    book, free = TaskBook(alone_s), TaskPromise(10_000.0, calls=4, pauses_count=False)
    serve(book, 100.0, 1.0, key(), task=free)
    second, _ = serve(book, 150.0, 1.0, key(), task=free)
    assert second.task_due_s == pytest.approx(150.0 + 9.0)
    ended = serve(book, 200.0, 7.5, key(), task=free, last=True)[1]
    assert ended is not None
    assert (ended.kept, ended.spent_s, ended.calls) == (True, 9.5, 3)


def test_the_share_is_learnt_by_the_number_of_the_call() -> None:
    book = TaskBook(alone_s)
    assert book.due(key(), call(0.0)).due_s == pytest.approx(10.0 / PRIOR_CALLS)
    teach(book, 10, pause_s=0.0)
    assert book.due(key(), call(0.0)).due_s == pytest.approx(10.0 / 10)
    for _ in range(6):
        serve(book, 0.0, 0.1, key())
    assert book.due(key(), call(0.0)).number == 7
    assert book.due(key(), call(0.0)).due_s == pytest.approx(10.0 / 4)


def test_pauses_to_come_are_put_aside() -> None:
    book = TaskBook(alone_s)
    teach(book, 4, pause_s=2.0)
    assert book.due(key(), call(0.0)).due_s == pytest.approx((10.0 - 3 * 2.0) / 4)


def test_a_late_call_gets_what_it_needs_and_more_weight_until_the_task_is_lost() -> None:
    book, task = TaskBook(alone_s), TaskPromise(10_000.0, calls=10)
    needed_s = 3 * (alone_s(50_000) + 128 * alone_s(1))
    late = book.due(key(), call(0.0, task, prompt_tokens=50_000))
    assert [late.due_s, late.weight] == pytest.approx([needed_s, needed_s / 1.0])
    book.begin(key(), call(0.0, task))
    late = book.due(key(), call(9.5, task, hint_tokens=500))
    assert late.weight == MOST_LATE_WEIGHT
    assert late.due_s == late.task_due_s == pytest.approx(10.0)
    lost = book.due(key(), call(11.0, task))
    assert lost.due_s == lost.task_due_s == pytest.approx(10.0)


def test_a_task_ends_with_its_last_call_or_when_it_is_idle() -> None:
    book = TaskBook(alone_s)
    assert serve(book, 0.0, 1.0, key("a"))[1] is None
    ended = serve(book, 2.0, 1.0, key("a"), last=True)[1]
    assert ended == TaskEnded(key("a"), 0, 2, 3.0, kept=True, promised=True)
    serve(book, 0.0, 11.0, key("late"), promised=False)
    assert book.sweep(10.0 + IDLE_S) == []
    assert book.sweep(11.0 + IDLE_S) == [TaskEnded(key("late"), 0, 1, 11.0, kept=False, promised=False)]
    assert len(book) == 0


def test_the_call_after_the_last_one_begins_another_task() -> None:
    book = TaskBook(alone_s)
    serve(book, 0.0, 1.0, key(), last=True)
    again = book.due(key(), call(50.0))
    assert (again.number, again.task_due_s) == (1, 60.0)


def test_the_first_call_says_what_is_promised() -> None:
    book = TaskBook(alone_s)
    serve(book, 0.0, 1.0, key())
    assert book.due(key(), call(2.0, TaskPromise(99_000.0))).task_due_s == pytest.approx(10.0)


def test_calls_side_by_side_end_the_task_together() -> None:
    book, free = TaskBook(alone_s), TaskPromise(10_000.0, pauses_count=False)
    first, _ = book.begin(key(), call(0.0, free))
    second, _ = book.begin(key(), call(1.0, free))
    assert book.call_ended(second, 3.0, 5, finished=True, promised=True, last=True) is None
    ended = book.call_ended(first, 4.0, 5, finished=True, promised=True, last=False)
    assert ended is not None
    assert (ended.calls, ended.spent_s) == (2, 4.0)


def test_a_client_that_leaves_counts_neither_way_unless_it_was_late() -> None:
    book = TaskBook(alone_s)
    in_time = serve(book, 0.0, 1.0, key(), last=True, finished=False)[1]
    late = serve(book, 20.0, 11.0, key(), last=True, finished=False)[1]
    assert in_time is not None
    assert late is not None
    assert (in_time.kept, late.kept) == (None, False)
    teach(book, 3, count=LEAST_TASKS - 1)
    assert book.due(key("x"), call(0.0)).due_s == pytest.approx(10.0 / PRIOR_CALLS)  # and taught nothing


def test_a_refused_call_never_was() -> None:
    book = TaskBook(alone_s)
    due, _ = book.begin(key(), call(0.0))
    book.withdraw(due)
    assert len(book) == 0
    serve(book, 5.0, 1.0, key())
    second, _ = book.begin(key(), call(7.0))
    book.withdraw(second)
    assert book.due(key(), call(8.0)).number == 2


def test_a_call_that_is_refused_after_another_came_leaves_nothing_in_flight() -> None:
    book = TaskBook(alone_s)
    (first, _), (second, _) = book.begin(key(), call(0.0)), book.begin(key(), call(0.1))
    book.withdraw(first)
    book.call_ended(second, 1.0, 10, finished=True, promised=True, last=False)
    ended = book.sweep(1.0 + 2.0 * IDLE_S)
    assert [one.key for one in ended] == [key()]
    assert len(book) == 0


def test_ten_thousand_sessions_of_one_tenant_do_not_end_those_of_another() -> None:
    book = TaskBook(alone_s, most=50, most_of_tenant=20)
    serve(book, 0.0, 1.0, key("mine", "quiet"))
    ended = [
        one for number in range(10_000) for one in book.begin(key(str(number), "loud"), call(float(number) / 1e4))[1]
    ]
    assert len(book) == 21
    assert len(ended) == 10_000 - 20
    assert {one.key.tenant for one in ended} == {"loud"}
    assert book.due(key("mine", "quiet"), call(2.0)).number == 2
    for tenant in range(40):
        serve(book, 3.0, 1.0, key("one", f"tenant {tenant}"))
    assert len(book) == 50
    assert book.due(key("mine", "quiet"), call(5.0)).number == 2


def test_what_a_forgotten_task_leaves_behind_touches_no_other() -> None:
    book = TaskBook(alone_s, most_of_tenant=1)
    first, _ = book.begin(key("a"), call(0.0))
    book.begin(key("b"), call(1.0))
    again, _ = book.begin(key("a"), call(2.0))
    assert book.call_ended(first, 3.0, 5, finished=True, promised=True, last=True) is None
    assert book.call_ended(again, 3.0, 5, finished=True, promised=True, last=True) is not None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_calls_are_due_within_their_task_and_all_tasks_are_accounted_for(seed: int, pauses_count: bool) -> None:
    random, book = np.random.default_rng(seed), TaskBook(alone_s, most=12, most_of_tenant=8)
    task, now_s, begun, ended = TaskPromise(5000.0, pauses_count=pauses_count), 0.0, 0, 0
    open_calls: list[CallDue] = []
    for _ in range(120):
        now_s += float(random.exponential(0.4))
        if open_calls and random.random() < 0.5:
            due = open_calls.pop(int(random.integers(len(open_calls))))
            last, whole = bool(random.random() < 0.2), bool(random.random() < 0.9)
            ended += book.call_ended(due, now_s, 10, finished=whole, promised=True, last=last) is not None
            continue
        due, over = book.begin(TaskKey(str(random.integers(2)), str(random.integers(12))), call(now_s, task))
        assert due.due_s <= due.task_due_s + 1e-9
        assert due.task_due_s <= now_s + 5.0 + 1e-9
        assert 1.0 <= due.weight <= MOST_LATE_WEIGHT
        begun += due.number == 1
        ended += len(over)
        open_calls.append(due)
    assert len(book) == begun - ended <= 12


CHAT = single_stage("chat", SLO(ttft_ms=500.0))
CODER = with_task(single_stage("coder", SLO()), TaskPromise(60_000.0, calls=5, pauses_count=False))


def test_a_class_and_a_request_say_what_a_task_is_promised() -> None:
    assert not CODER.best_effort
    assert task_of(task_applied(CODER, CODER, None, None)) == CODER.task
    assert task_of(task_applied(CODER, CODER, 9000.0, 2)) == TaskPromise(9000.0, 2, pauses_count=False)
    last = task_applied(CHAT, CODER, None, None)
    assert last is not None
    assert (last.name, last.slo, task_of(last)) == ("chat", CHAT.slo, CODER.task)
    assert task_applied(CHAT, CHAT, None, None) is CHAT
    own = task_applied(None, None, 5000.0, None)
    assert own is not None
    assert (own.name, task_of(own)) == ("custom", TaskPromise(5000.0))
    with pytest.raises(InvalidFieldError, match="slo_task_calls"):
        task_applied(CHAT, CHAT, None, 3)
