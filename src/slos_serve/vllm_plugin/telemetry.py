"""Telemetry leaves the scheduler through a bounded queue and a thread of its own.

The scheduler appends a call and goes on: no file, no lock and no formatting on its path. The thread carries the calls
out in order, while the scheduler waits for its workers: Python runs one of the two at a time. When it cannot keep up
the newest calls are dropped and counted; a call that fails is counted and logged with growing distance.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec

from vllm.logger import init_logger

logger = init_logger("vllm.slos_serve")

P = ParamSpec("P")
MOST_CALLS = 20_000
# Between two rounds; without a good moment the next one comes then.
EVERY_S = 0.05


class Telemetry:
    """Carries out calls behind the scheduler's back.

    Attributes:
        dropped: calls left out because the queue was full.
        failed: calls that raised.
        each_round: called by the thread after each round of calls, up to twenty times a second.
    """

    def __init__(self, most_calls: int = MOST_CALLS) -> None:
        self.dropped = 0
        self.failed = 0
        self._most_calls = most_calls
        self.each_round: Callable[[], None] | None = None
        self._calls: deque[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = deque()
        self._ended = False
        self._due = threading.Event()
        self._last_s = time.monotonic()
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="slos-serve telemetry", daemon=True)
        self._thread.start()

    def post(self, call: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have ``call`` carried out soon; returns at once. Arguments must not change afterwards."""
        if len(self._calls) >= self._most_calls:
            self.dropped += 1
        else:
            self._calls.append((call, args, kwargs))

    def now(self) -> None:
        """The scheduler waits for its workers: a round is welcome, if the last one is some time ago."""
        if time.monotonic() - self._last_s >= EVERY_S:
            self._due.set()

    def flush(self) -> None:
        """Carry out what is queued now, in the caller's thread: for the end of an engine and for tests."""
        with self._busy:
            while self._calls:
                self._carry_out(*self._calls.popleft())

    def close(self) -> None:
        """Carry out what is left and end the thread."""
        self._ended = True
        self._due.set()
        self._thread.join(timeout=5.0)
        self.flush()

    def _work(self) -> None:
        while not self._ended:
            self._due.wait(EVERY_S)
            self._due.clear()
            self._last_s = time.monotonic()
            self.flush()
            if self.each_round is not None:
                self._carry_out(self.each_round, (), {})

    def _carry_out(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            self.failed += 1
            if self.failed & (self.failed - 1) == 0:
                logger.error("slos-serve: telemetry failed (%d times so far).", self.failed, exc_info=error)
