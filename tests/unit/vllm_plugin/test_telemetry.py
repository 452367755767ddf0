"""The scheduler's telemetry: in order, bounded, and its failures stay behind."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from slos_serve.vllm_plugin.events import EventLog
from slos_serve.vllm_plugin.telemetry import EVERY_S, Telemetry


def test_calls_are_carried_out_in_order() -> None:
    telemetry, seen = Telemetry(), list[int]()
    for number in range(100):
        telemetry.post(seen.append, number)
    telemetry.close()
    assert seen == list(range(100))
    assert telemetry.dropped == telemetry.failed == 0


def test_rounds_come_when_the_scheduler_waits_and_not_too_often() -> None:
    began_s = time.monotonic()
    telemetry, rounds = Telemetry(), list[int]()
    telemetry.each_round = lambda: rounds.append(1)
    while len(rounds) < 5:
        telemetry.now()
        time.sleep(0.001)
    telemetry.close()
    assert len(rounds) <= 2 + (time.monotonic() - began_s) / EVERY_S


def test_without_steps_calls_are_carried_out_too() -> None:
    telemetry, done = Telemetry(), threading.Event()
    telemetry.post(done.set)
    assert done.wait(60.0)
    telemetry.close()


def test_a_full_queue_drops_and_counts() -> None:
    telemetry, seen = Telemetry(most_calls=10), list[int]()
    telemetry._busy.acquire()  # the thread cannot work meanwhile
    try:
        for number in range(25):
            telemetry.post(seen.append, number)
    finally:
        telemetry._busy.release()
    telemetry.close()
    assert seen == list(range(10))
    assert telemetry.dropped == 15


def test_a_call_that_fails_is_counted_and_the_next_one_runs() -> None:
    telemetry, seen = Telemetry(), list[int]()

    def fail() -> None:
        raise OSError(28, "No space left on device")

    telemetry.post(fail)
    telemetry.post(seen.append, 1)
    telemetry.close()
    assert (seen, telemetry.failed) == ([1], 1)


def test_events_have_a_time_and_rotate(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = EventLog(path, most_bytes=2_000)
    for number in range(60):
        events.write("step", 1_700_000_000.25, number=number)
    events.write("request")
    events.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0]["time_s"] == 1_700_000_000.25
    assert lines[-1]["kind"] == "request"
    assert path.stat().st_size <= 2_000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "events.jsonl.1"]


def test_a_full_disk_raises_where_it_can_be_counted() -> None:
    events = EventLog(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        events.write("step")
    events.close()
