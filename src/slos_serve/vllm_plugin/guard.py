"""Fail-open: a fault of ours costs a step its plan, never a request its answer.

Every call into our code from an overridden method of vLLM goes through :meth:`Guard.run`. A fault is counted by kind
and logged with its traceback; repeats of the same fault are logged with growing distance. After ``fault_limit`` faults
with no planned step in between the plug-in disarms itself until the engine restarts: every step is stock then. A plan
that takes too long is used (its time is spent). One alone changes nothing: a step in stock order starts whoever waits,
which costs promises more than a slow plan costs time. When the next comes before ``CALM_PLANS`` plans were in time, a
step is stock, then 2, 4, up to 64 while overruns go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vllm.logger import init_logger

logger = init_logger("vllm.slos_serve")

P = ParamSpec("P")
R = TypeVar("R")
MOST_REST_STEPS = 64
# So many plans in time halve the rest that the next overrun brings.
CALM_PLANS = 8
_MOST_LATE = MOST_REST_STEPS.bit_length() + 1


class Guard:
    """Faults of one scheduler's plug-in, and what follows from them.

    Args:
        fault_limit: faults in a row after which the plug-in disarms itself.

    Attributes:
        armed: False once it has disarmed itself.
        counts: steps that ran in stock order, faults and overruns, by kind; only grows.
        resting: steps left that run in stock order after an overrun.
    """

    def __init__(self, fault_limit: int) -> None:
        self.armed = True
        self.counts: dict[str, int] = {}
        self.resting = 0
        self._fault_limit = fault_limit
        self._in_a_row = 0
        self._late = self._in_time = 0
        self._logged: dict[str, int] = {}

    def run(self, kind: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """What ``call`` returns; ``None`` and one fault more of ``kind`` when it raises."""
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.fault(kind, error)
            return None

    def fault(self, kind: str, error: Exception) -> None:
        """Count one fault of ours, log it, and disarm after too many in a row."""
        self.count(kind)
        self._in_a_row += 1
        name = f"{kind}: {type(error).__name__}"
        seen = self._logged[name] = self._logged.get(name, 0) + 1
        if seen & (seen - 1) == 0:  # the 1st, 2nd, 4th, 8th ... of its kind
            logger.error("slos-serve: %s failed (%d times so far); this step is stock.", kind, seen, exc_info=error)
        if self.armed and self._in_a_row >= self._fault_limit:
            self.armed = False
            logger.error(
                "slos-serve: disarmed after %d faults in a row; every step runs in stock order until the engine "
                "restarts (slos_serve:armed is 0).",
                self._in_a_row,
            )

    def count(self, kind: str) -> None:
        """One step or call more of ``kind``."""
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def overran(self, seconds: float, limit_s: float) -> None:
        """A plan took longer than its limit: rest for some steps, if others did lately."""
        self.count("overrun")
        self._late, self._in_time = min(self._late + 1, _MOST_LATE), 0
        self.resting = 1 << (self._late - 2) if self._late > 1 else 0
        seen = self.counts["overrun"]
        if seen & (seen - 1) == 0:
            logger.warning(
                "slos-serve: planning took %.1f ms (limit %.1f ms; %d times so far); the next %d steps are stock.",
                seconds * 1e3,
                limit_s * 1e3,
                seen,
                self.resting,
            )

    def planned(self, in_time: bool) -> None:
        """A step was planned, steered and committed without a fault."""
        self._in_a_row = 0
        if not in_time:
            return
        self._in_time += 1
        if self._in_time >= CALM_PLANS:
            self._in_time, self._late = 0, max(self._late - 1, 0)
