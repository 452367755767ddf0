"""Marks on requests that a policy keeps itself: by slot, and gone when the slot goes to another request."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.request import RequestArray, SlotArray

_NOBODY = -1


def among(rows: RequestArray, slots: SlotArray, others: SlotArray) -> NDArray[np.bool_]:
    """bool [n]: which of ``slots`` are in ``others``."""
    found = np.zeros(len(rows), dtype=np.bool_)
    found[others] = True
    return np.asarray(found[slots])


class SlotMarks:
    """A set of requests. A request is told from a later one in its slot by its ``order``."""

    def __init__(self) -> None:
        self._order = np.full(64, _NOBODY, dtype=np.int64)

    def of(self, rows: RequestArray, slots: SlotArray) -> NDArray[np.bool_]:
        """bool [n]: which of ``slots`` are marked."""
        known = slots < len(self._order)
        return np.asarray(known & (self._order[np.where(known, slots, 0)] == rows["order"][slots]))

    def orders(self, rows: RequestArray) -> NDArray[np.int64]:
        """int64 [rows or more]: a request is marked where its slot's value is its ``order``. For kernels."""
        if len(self._order) < len(rows):
            more = np.full(len(rows) - len(self._order), _NOBODY, dtype=np.int64)
            self._order = np.concatenate((self._order, more))
        return self._order

    def add(self, rows: RequestArray, slots: SlotArray) -> None:
        """Mark ``slots``."""
        self.orders(rows)[slots] = rows["order"][slots]

    def clear(self) -> None:
        """Nobody is marked any more."""
        self._order[:] = _NOBODY
