"""When the step that is being planned will start, and how long executed steps took.

With async scheduling the next step is planned while the current one runs, so it starts at that one's predicted end.
Without, the engine schedules, and hands tokens out, between two steps: a reader of tokens waits for that too, so it is
part of the step that follows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from slos_serve.perf.batch_time import BatchShape

# An engine that takes longer than this to schedule its next step is taken to have had nothing to run meanwhile.
MOST_BETWEEN_S = 0.02


@dataclass(slots=True)
class _Step:
    output: object
    shape: BatchShape
    scheduled_s: float
    predicted_s: float


class StepClock:
    """Steps in flight, oldest first."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()
        self._last_done_s = float("-inf")

    def scheduled(self, output: object, shape: BatchShape, now_s: float, predicted_s: float) -> None:
        """A step was handed to the engine; ``output`` identifies it."""
        self._steps.append(_Step(output, shape, now_s, predicted_s))

    def done(self, output: object, now_s: float) -> tuple[BatchShape, float] | None:
        """The step's output has come: its shape and the seconds it took; ``None`` if it was not timed."""
        since_s, self._last_done_s = self._last_done_s, now_s
        if not any(step.output is output for step in self._steps):
            return None  # made while nobody had a promise
        step = self._steps.popleft()
        while step.output is not output:
            step = self._steps.popleft()  # the engine has dropped it
        return step.shape, now_s - self._began_s(step.scheduled_s, since_s)

    def rests(self) -> None:
        """The engine has nothing to run: the next step begins when it is scheduled, however soon."""
        self._last_done_s = float("-inf")

    def next_start_s(self, now_s: float) -> float:
        """When a step scheduled now will start."""
        if not self._steps:
            return self._began_s(now_s, self._last_done_s)
        end_s = self._last_done_s
        for step in self._steps:
            end_s = self._began_s(step.scheduled_s, end_s) + step.predicted_s
        return max(now_s, end_s)

    @staticmethod
    def _began_s(scheduled_s: float, last_end_s: float) -> float:
        """When a step began, given the end of the one before it."""
        return last_end_s if scheduled_s - last_end_s < MOST_BETWEEN_S else scheduled_s
