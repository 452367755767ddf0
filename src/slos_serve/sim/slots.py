"""What a replica knows of each row of its request table beyond what the policy sees."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Item = TypeVar("_Item", np.int64, np.bool_)


class Slots:
    """Arrays with one entry a table row, [slots]; those of the step that executes have one entry a request in it.

    Attributes:
        held_blocks: KV blocks of the request.
        call_of: row of the workload; -1 where there is no request.
        present: there is a request.
        seen: false between two checks of a plan.
        step_slots, step_tokens, step_drafts: the step that executes.
        step_accepted: drafts that were right; -1 where none were verified.
        scratch: slots that a rule of the engine returns.
    """

    def __init__(self, size: int) -> None:
        self.held_blocks, self.call_of = np.zeros(size, dtype=np.int64), np.full(size, -1, dtype=np.int64)
        self.present, self.seen = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
        self.step_slots, self.step_tokens = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        self.step_drafts, self.step_accepted = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        self.scratch = np.zeros(size, dtype=np.int64)

    def fit(self, size: int) -> None:
        """One entry a table row; a step may be executing, so entries are kept."""
        before = len(self.present)
        if size == before:
            return
        for name, array in vars(self).items():
            setattr(self, name, _grown(array, size))
        self.call_of[before:] = -1

    def enter(self, slot: int, call: int) -> None:
        """A request enters."""
        self.call_of[slot] = call
        self.present[slot] = True

    def leave(self, slot: int) -> int:
        """A request leaves; returns its call."""
        call = int(self.call_of[slot])
        self.present[slot] = False
        self.call_of[slot] = -1
        return call


def _grown(old: NDArray[_Item], size: int) -> NDArray[_Item]:
    """``old`` with zeros appended up to ``size``."""
    new = np.zeros(size, dtype=old.dtype)
    new[: len(old)] = old
    return new
