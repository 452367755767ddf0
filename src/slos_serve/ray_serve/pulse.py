"""Whether the engine behind a replica still answers, from its publications and the calls that wait for it.

An engine that works finishes steps, and falls silent when nothing is left to do. So silence means rest while no call
waits, and trouble once one has waited for long. Publications carry how many steps the engine has finished; a busy
engine may publish rarely, and one that hangs may still publish, so the count is what is judged. Where publications have
no count, each of them is taken for a finished step.
"""

from __future__ import annotations

import math

REST_S = 1.0


class Pulse:
    """Of one engine. Times come from the caller, on one clock."""

    def __init__(self) -> None:
        self._stepped_s = -math.inf
        self._steps_done: int | None = None
        self._left = 0
        self._calls: dict[int, float] = {}
        self._next = 0

    @property
    def num_calls(self) -> int:
        """Calls that the engine has not answered in full."""
        return len(self._calls)

    def published(self, now_s: float, num_requests: int, steps_done: int | None = None) -> None:
        """A publication came.

        Args:
            now_s: when.
            num_requests: unfinished requests that it shows.
            steps_done: steps that the engine has finished since its start, where the publication says it.
        """
        if steps_done is None or steps_done != self._steps_done or num_requests == 0:
            self._stepped_s = now_s
        self._steps_done = steps_done
        self._left = num_requests

    def call_began(self, now_s: float) -> int:
        """A call goes to the engine; the number is for :meth:`call_ended`."""
        self._next += 1
        self._calls[self._next] = now_s
        return self._next

    def call_ended(self, number: int) -> None:
        """The call is over, however it ended."""
        self._calls.pop(number, None)

    def silent_s(self, now_s: float) -> float:
        """How long calls have waited without a finished step; 0 when none waits."""
        oldest_s = min(self._calls.values(), default=math.inf)
        return max(now_s - max(self._stepped_s, oldest_s), 0.0)

    def resting(self, now_s: float) -> bool:
        """Whether its last publication, of an empty engine, still holds."""
        return self._stepped_s > -math.inf and self._left == 0 and self.silent_s(now_s) < REST_S
