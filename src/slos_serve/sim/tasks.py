"""Whole tasks in virtual time: when the calls of a workload's tasks are due, and how their tasks are scored.

A session of a class with a task is a task. The same book as while serving says when each call is due; of a call's task
it knows neither how many calls follow nor how long they are. One book serves all replicas, as a fleet's ingress does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.tasks import task_of
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.tasks import CallAsked, CallDue, TaskBook, TaskKey
from slos_serve.sim.recording import Recording


class SimTasks:
    """The tasks of one run.

    Args:
        recording: of the workload.
        batch_time: of its engines.
        oracle_lengths: the book is told how long answers are.
    """

    def __init__(self, recording: Recording, batch_time: BatchTimeModel, *, oracle_lengths: bool = False) -> None:
        self._recording = recording
        self._tasks = [task_of(slo_class) for slo_class in recording.workload.classes]
        self._oracle_lengths = oracle_lengths
        self._book = TaskBook(batch_time.zero_load_s)
        self._calls: dict[int, CallDue] = {}

    def begin(self, call: int, arrival_s: float) -> CallDue | None:
        """When a call that arrived at ``arrival_s`` is due, ``None`` without a task; the same when asked again."""
        row = self._recording.workload.calls[call]
        task = self._tasks[int(row["class_index"])]
        if task is None:
            return None
        if call not in self._calls:
            asked = CallAsked(
                task,
                int(row["class_index"]),
                arrival_s,
                int(row["prompt_tokens"]),
                int(row["max_tokens"]),
                int(row["output_tokens"]) if self._oracle_lengths else 0,
            )
            self._calls[call], _ = self._book.begin(TaskKey("", str(int(row["session"]))), asked)
        return self._calls[call]

    def ended(self, call: int, now_s: float, *, whole: bool) -> None:
        """A call left."""
        due = self._calls.get(call)
        if due is None:
            return
        record = self._recording.calls[call]
        last = int(self._recording.workload.calls["next_call"][call]) < 0
        self._book.call_ended(
            due,
            now_s,
            int(record["output_tokens"]),
            finished=whole,
            promised=bool(record["admitted"]),
            last=last,
        )


def call_targets_s(recording: Recording) -> NDArray[np.float64]:
    """float64 [calls]: seconds from a call's arrival to the end of its task's time; ``inf`` without a task.

    So a session whose every call ended by then is a task that was kept.
    """
    calls, records = recording.workload.calls, recording.calls
    left_s = np.full(len(calls), np.inf)
    for index, slo_class in enumerate(recording.workload.classes):
        task = task_of(slo_class)
        if task is None:
            continue
        for first in np.flatnonzero((calls["class_index"] == index) & np.isfinite(calls["arrival_s"])).tolist():
            spent_s, begun_s, call = 0.0, float(records["arrival_s"][first]), int(first)
            while call >= 0:
                if task.pauses_count:
                    spent_s = float(records["arrival_s"][call]) - begun_s
                left_s[call] = task.task_s - spent_s
                spent_s += float(records["done_s"][call] - records["arrival_s"][call])
                call = int(calls["next_call"][call])
    return left_s
