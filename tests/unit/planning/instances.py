"""Demands and supplies by hand, for tests of the parts of admission."""

from __future__ import annotations

import numpy as np

from slos_serve.planning.demand import Demand
from slos_serve.planning.supply import Supply

RATE = 1000.0


def supply(
    blocks: float = 100.0, lent: tuple[float, float] = (0.0, 0.0), seats: tuple[float, float] = (100.0, 100.0)
) -> Supply:
    """About ``RATE`` prefill tokens a second from 0 s on, no decodes yet; ``lent``, ``seats``: by 0 and by 10 s."""
    # A token takes a millisecond and a batch nothing else, so that sums can be done in the head.
    coefficients = np.array([1.0 / RATE, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    none, one = np.zeros(1), np.ones(1)
    moments_s = np.array([0.0, 10.0])
    return Supply(
        coefficients,
        1e6,
        0.0,
        0.0,
        none,
        0.1 * one,
        one,
        none,
        np.array([blocks]),
        moments_s,
        np.array(lent),
        np.array(seats),
    )


def demand(
    due_s: list[float],
    tokens: list[float],
    *,
    blocks: list[float] | None = None,
    weight: list[float] | None = None,
    promised: list[bool] | None = None,
    needs_seat: list[float] | None = None,
) -> Demand:
    """Requests of one tier."""
    count = len(due_s)
    return Demand(
        np.arange(count),
        np.array(due_s),
        np.array(tokens),
        np.zeros(count, dtype=np.int64),
        np.array(blocks or [1.0] * count)[:, None],
        np.array(weight or [1.0] * count),
        np.array(promised or [False] * count),
        np.array(needs_seat or [1.0] * count),
    )
