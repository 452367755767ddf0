"""What Algorithm 1 need not look at: requests that are in no set, and states that cannot beat the best set found.

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
from slos_serve.planning.state import BoolArray, FloatArray, IntArray
from slos_serve.planning.supply import Supply, rate_beside


@njit(cache=True)
def could_fit(demand: Demand, supply: Supply) -> BoolArray:
    """Requests that fit beside the promised ones alone; no other can be in any set."""
    found = demand.promised.copy()
    lent, seats, counts, n = lent_until(demand, supply), seats_until(demand, supply), supply.counts.copy(), len(found)
    spare, free, started = np.empty(n), np.empty(n), 0.0
    budget, last_s, last_lent = 0.0, supply.start_s, 0.0
    rate, room = rate_beside(counts, supply), supply.blocks.copy()
    for i in range(n):
        due_s = max(demand.due_s[i], last_s)
        budget += rate * (due_s - last_s) + lent[i] - last_lent
        last_s, last_lent = due_s, lent[i]
        if found[i]:
            budget -= demand.tokens[i]
            started += demand.needs_seat[i]
            counts[demand.tier[i]] += 1.0
            rate = rate_beside(counts, supply)
            room -= demand.blocks[i]
        spare[i], free[i] = budget, seats[i] - started
    least, fewest = np.inf, np.inf
    for i in range(n - 1, -1, -1):
        if found[i]:
            least = min(least, spare[i])
            fewest = min(fewest, free[i]) if demand.needs_seat[i] > 0.0 else fewest
        else:
            held = (demand.blocks[i] <= room + 2.0 * TOLERANCE).all()
            held = held and demand.needs_seat[i] <= min(fewest, free[i]) + 2.0 * TOLERANCE
            found[i] = held and demand.tokens[i] <= min(least, spare[i]) + 2.0 * TOLERANCE
    return found


class Bounds(NamedTuple):
    """What the requests from position i on may still add; float64 [n + 1] unless said otherwise.

    Attributes:
        open_: bool [n], could be in some set.
        weight: of the open ones that are not promised; cheapest: least tokens for a unit of it; heaviest: of one.
        promised_tokens, promised_weight: of the promised ones.
        since_s: float64 [n], deadlines after the start; lent, seats: float64 [n], see :func:`lent_until` and
            :func:`seats_until`; most_seats: the most of the latter.
        stride: int64 [L], of each tier in a state's key.
    """

    open_: BoolArray
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
def bounds_of(demand: Demand, supply: Supply, open_: BoolArray) -> Bounds:
    """Sums over the requests still to come, from the last one back."""
    n = len(open_)
    weight, tokens, promised_weight = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    cheapest, heaviest = np.full(n + 1, np.inf), np.zeros(n + 1)
    in_tier = np.ones(len(supply.counts), dtype=np.int64)
    for i in range(n - 1, -1, -1):
        promised, asks = demand.promised[i], open_[i] and not demand.promised[i]
        weight[i] = weight[i + 1] + (demand.weight[i] if asks else 0.0)
        cheapest[i] = min(cheapest[i + 1], demand.tokens[i] / demand.weight[i] if asks else np.inf)
        heaviest[i] = max(heaviest[i + 1], demand.weight[i] if asks else 0.0)
        tokens[i] = tokens[i + 1] + (demand.tokens[i] if promised else 0.0)
        promised_weight[i] = promised_weight[i + 1] + (demand.weight[i] if promised else 0.0)
        in_tier[demand.tier[i]] += 1 if open_[i] else 0
    stride = np.ones(len(in_tier), dtype=np.int64)
    for tier in range(1, len(in_tier)):
        stride[tier] = stride[tier - 1] * in_tier[tier - 1]
    since_s = np.maximum(demand.due_s - supply.start_s, 0.0)
    lent, seats = lent_until(demand, supply), seats_until(demand, supply)
    return Bounds(
        open_, weight, cheapest, heaviest, tokens, promised_weight, since_s, lent, seats, float(seats.max()), stride
    )


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
