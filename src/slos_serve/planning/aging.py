"""Progress for whoever holds no promise, however long overload lasts.

The oldest request without a promise (best effort, or passed over again and again, whatever it weighs) gets a turn
when it has made no progress for ``aging_s``: a step computes some of its prompt first, whatever else waits. From its
first turn on it keeps what it has: it is preempted for nobody, its KV is kept free of promises, and while it decodes a
turn comes ten times as often. Then the next oldest. So every request ends, however long overload lasts, once promises
that end have given it the memory to start (docs/scheduling.md states by when).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.planning.candidates import ADMITTED, tokens_to_do
from slos_serve.planning.memory import peak_blocks

NOBODY = -1
# A token costs a step little, and what it waits with keeps KV from others.
DECODE_TURNS = 10.0


@njit(cache=True)
def oldest_unpromised(rows: RequestArray, running: SlotArray, waiting: SlotArray) -> int:
    """The request without a promise that came first, -1 when there is none."""
    oldest = -1
    for part in (running, waiting):
        for slot in part:
            if rows["status"][slot] == ADMITTED or tokens_to_do(rows, slot) <= 0:
                continue
            if oldest < 0 or rows["order"][slot] < rows["order"][oldest]:
                oldest = slot
    return int(oldest)


class Aging:
    """Watches the oldest request without a promise.

    Args:
        every_s: longest time it goes without progress; 0 for never a turn.

    Attributes:
        kept: slot of a request that has begun to have turns, -1 for none.
        due: its turn is now.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._order = -1
        self._progress = -1
        self._since_s = -np.inf
        self._had_turn = False
        self.kept = NOBODY
        self.due = False

    def look(self, rows: RequestArray, running: SlotArray, waiting: SlotArray, now_s: float) -> None:
        """Find who is oldest at ``now_s`` and whether it is due a turn."""
        self.kept, self.due = NOBODY, False
        if self._every_s <= 0.0:
            return
        slot = oldest_unpromised(rows, running, waiting)
        if slot < 0:
            self._order = -1
            return
        row = rows[slot]
        order, progress = int(row["order"]), int(row["computed_tokens"] + row["output_tokens"])
        if order != self._order:
            self._order, self._had_turn = order, False
            self._progress, self._since_s = progress, now_s
        elif progress > self._progress:  # what a preemption took has to be made good first
            self._progress, self._since_s = progress, now_s
        decodes = row["output_tokens"] > 0 and row["running"] == 1
        every_s = self._every_s / DECODE_TURNS if self._had_turn and decodes else self._every_s
        self.due = now_s - self._since_s >= every_s
        self._had_turn = self._had_turn or self.due
        self.kept = slot if self._had_turn else NOBODY

    def blocks(self, rows: RequestArray, block_size: int) -> int:
        """KV blocks that promises leave to it."""
        return int(peak_blocks(rows, self.kept, block_size)) if self.kept != NOBODY else 0
