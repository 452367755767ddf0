"""Rows of running requests are what vLLM counts, whether they are read or follow from the steps that were planned."""

from __future__ import annotations

import functools
import operator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import FCFSRequestQueue

from slos_serve.testing.request import RequestFeatures
from slos_serve.vllm_plugin import compat_kv
from slos_serve.vllm_plugin.progress import AUDIT_EVERY
from slos_serve.vllm_plugin.steering import _place_in, _remove
from tests.vllm.dry_load import Start, assert_answers, mixed_load
from tests.vllm.progress_check import check_rows


def counted(start: Start, **arguments: Any) -> tuple[Any, dict[str, int]]:
    """An engine whose rows are checked in every plan, and how often they followed from steps and were read."""
    engine = start(**arguments)
    check_rows(engine.scheduler)
    book, calls = engine.scheduler._slo.book, {"advance": 0, "read": 0}
    advance, read = book.progress.advance, book._read

    def advancing(*given: Any) -> None:
        calls["advance"] += 1
        advance(*given)

    def reading(requests: Any, slots: Any, **given: Any) -> Any:
        calls["read"] += len(slots) > 1
        return read(requests, slots, **given)

    book.progress.advance, book._read = advancing, reading
    return engine, calls


@pytest.mark.parametrize(("depth", "num_blocks"), [(2, 4000), (3, 400)])
def test_rows_follow_from_planned_steps(start: Start, depth: int, num_blocks: int) -> None:
    """With preemptions too, where KV is short."""
    engine, calls = counted(start, depth=depth, num_blocks=num_blocks)
    mixed_load(engine)
    assert_answers(engine)
    assert engine.scheduler._slo.guard.counts == {}
    assert calls["advance"] > 4 * calls["read"] > 0


def test_rows_are_read_after_a_step_of_vllms_own(start: Start) -> None:
    engine, calls = counted(start)
    for number in range(6):
        engine.add(f"r{number}", [7 + number] * 300, 90, {"slo_class": "chat"})
    for _ in range(20):
        engine.step()
    before = dict(calls)
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.step()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.step()
    assert calls["read"] > before["read"]
    engine.run()
    assert engine.scheduler._slo.guard.counts == {}


def test_rows_are_read_every_so_often(start: Start) -> None:
    engine, calls = counted(start)
    for number in range(3):
        engine.add(f"r{number}", [7 + number] * 50, 5 * AUDIT_EVERY, {"slo_class": "chat"})
    for _ in range(10):
        engine.step()
    before = dict(calls)
    for _ in range(3 * AUDIT_EVERY):
        engine.step()
    assert calls["read"] - before["read"] == 3
    assert calls["advance"] - before["advance"] == 3 * (AUDIT_EVERY - 1)


def test_sessions_and_drafts_are_read(start: Start) -> None:
    engine, calls = counted(start)
    engine.add("session", [9] * 50, 30, {"slo_class": "chat"}, RequestFeatures(resumable=True))
    engine.add("plain", [8] * 50, 30, {"slo_class": "chat"})
    for _ in range(12):
        engine.step()
    assert calls["advance"] == 0
    engine.close("session")
    engine.run()
    assert engine.scheduler._slo.guard.counts == {}
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    engine, calls = counted(start, speculative_config=ngram)
    engine.add("drafts", [8] * 50, 30, {"slo_class": "chat"})
    engine.run()
    assert calls["advance"] == 0
    assert engine.scheduler._slo.guard.counts == {}


def test_a_search_finds_the_same_wherever_it_begins() -> None:
    for high in range(12):
        for answer in range(high + 1):
            for guess in range(14):
                assert compat_kv._largest(high, functools.partial(operator.ge, answer), guess) == answer


def test_a_search_that_begins_at_the_answer_asks_twice() -> None:
    asked: list[int] = []

    def holds(count: int) -> bool:
        asked.append(count)
        return count <= 500

    assert compat_kv._largest(1000, holds, 500) == 500
    assert asked == [500, 501]


def test_a_started_request_is_found_in_a_deep_queue_without_a_scan() -> None:
    """By arrival; one that was put to the front out of order is left to vLLM's own search."""
    queue = FCFSRequestQueue(SimpleNamespace(name=at, arrival_time=at // 2) for at in range(1000))  # two at a time
    looked: list[int] = []

    class Counting(FCFSRequestQueue):
        def __getitem__(self, at: Any) -> Any:
            looked.append(at)
            return super().__getitem__(at)

    counting = Counting(queue)
    for number in (0, 701, 999):
        assert _place_in(counting, queue[number]) == number
    assert len(looked) < 3 * 20
    last = queue.pop()
    assert _place_in(queue, last) is None
    queue.prepend_request(last)
    assert _place_in(queue, last) is None
    _remove(queue, [last])
    assert last not in queue
    assert len(queue) == 999
