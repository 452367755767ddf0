"""What Algorithm 1 need not look at: states that cannot beat the best set found.

It changes how long the program takes, never an exact answer: ``tests/property/test_admission_exact.py`` compares that
with brute force.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.perf.jit import in_place
from slos_serve.planning.demand import Demand
from slos_serve.planning.feasible import TOLERANCE, lent_until, seats_until
from slos_serve.planning.state import FloatArray, IntArray
from slos_serve.planning.supply import Supply


class Bounds(NamedTuple):
    """What the requests from position i on may still add; float64 [n + 1] unless said otherwise.

    Attributes:
        weight: of those that are not promised; cheapest: least tokens for a unit of it; heaviest: of one.
        promised_tokens, promised_weight: of the promised ones.
        since_s: float64 [n], deadlines after the start; lent, seats: float64 [n], see :func:`lent_until` and
            :func:`seats_until`; most_seats: the most of the latter.
        stride: int64 [L], of each tier in a state's key.
    """

    weight: FloatArray
    cheapest: FloatArray
    heaviest: FloatArray
    promised_tokens: FloatArray
    promised_weight: FloatArray
    since_s: FloatArray
    lent: FloatArray
    seats: FloatArray
    most_seats: float
    stride: IntArray


@njit(cache=True)
def bounds_of(demand: Demand, supply: Supply) -> Bounds:
    """Sums over the requests still to come, from the last one back."""
    n = len(demand.due_s)
    weight, tokens, promised_weight = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    cheapest, heaviest = np.full(n + 1, np.inf), np.zeros(n + 1)
    in_tier = np.ones(len(supply.counts), dtype=np.int64)
    for i in range(n - 1, -1, -1):
        promised = demand.promised[i]
        weight[i] = weight[i + 1] + (demand.weight[i] if not promised else 0.0)
        cheapest[i] = min(cheapest[i + 1], demand.tokens[i] / demand.weight[i] if not promised else np.inf)
        heaviest[i] = max(heaviest[i + 1], demand.weight[i] if not promised else 0.0)
        tokens[i] = tokens[i + 1] + (demand.tokens[i] if promised else 0.0)
        promised_weight[i] = promised_weight[i + 1] + (demand.weight[i] if promised else 0.0)
        in_tier[demand.tier[i]] += 1
    stride = np.ones(len(in_tier), dtype=np.int64)
    for tier in range(1, len(in_tier)):
        stride[tier] = stride[tier - 1] * in_tier[tier - 1]
    since_s = np.maximum(demand.due_s - supply.start_s, 0.0)
    lent, seats = lent_until(demand, supply), seats_until(demand, supply)
    return Bounds(weight, cheapest, heaviest, tokens, promised_weight, since_s, lent, seats, float(seats.max()), stride)


@in_place
def cannot_win(
    bounds: Bounds, i: int, value: float, at_end: float, started: float, best_value: float, best_budget: float
) -> bool:
    """Whether no set that extends a state with requests from position i on beats the best set found.

    A state's rate never rises with another decode, and a unit of weight costs at least that of the cheapest request
    left.

    Args:
        value, started: of the state, see :class:`slos_serve.planning.algorithm1.Labels`.
        at_end: budget that it would have at the last deadline.
    """
    value += bounds.promised_weight[i]
    budget = at_end + bounds.lent[-1] - bounds.promised_tokens[i]
    most = value
    if bounds.weight[i] > 0.0:
        by_seats = max(bounds.most_seats - started + 2.0 * TOLERANCE, 0.0) * bounds.heaviest[i]
        most += min(bounds.weight[i], max(budget + 2.0 * TOLERANCE, 0.0) / bounds.cheapest[i], by_seats)
    if most < best_value - 1e-9:
        return True
    missing = best_value - value
    spent = missing * bounds.cheapest[i] if missing > 1e-9 else 0.0
    return bool(most <= best_value + 1e-9 and budget - spent < best_budget - TOLERANCE)
