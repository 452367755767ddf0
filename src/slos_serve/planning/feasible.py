"""When a set of requests fits: the one rule of admission, of its tests' brute force and of the router's mirrors."""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import per_token_s
from slos_serve.planning.demand import Demand
from slos_serve.planning.state import BoolArray, FloatArray
from slos_serve.planning.supply import Supply, rate_beside

TOLERANCE = 1e-6


@njit(cache=True)
def lent_until(demand: Demand, supply: Supply) -> FloatArray:
    """float64 [n]: prefill tokens that decodes lend from the start until each deadline."""
    if len(demand.due_s) == 0:
        return np.zeros(0)
    at_s = np.append(np.maximum(demand.due_s, supply.start_s), supply.start_s)
    lent = np.interp(at_s, supply.moments_s, supply.lent_tokens)
    since_start: FloatArray = lent[:-1] - lent[-1]
    return since_start


@njit(cache=True)
def seats_until(demand: Demand, supply: Supply) -> FloatArray:
    """float64 [n]: requests that can have started by when the prompt of each must start, alone on the engine."""
    start_by_s = demand.due_s - demand.tokens * per_token_s(supply.coefficients)
    found: FloatArray = np.interp(start_by_s, supply.moments_s, supply.seats)
    return found


@in_place
def unseated(demand: Demand, i: int, started: float, seats: FloatArray) -> bool:
    """Whether request i, the last of ``started`` that need a seat, finds none in time.

    Args:
        seats: see :func:`seats_until`.
    """
    return bool(demand.needs_seat[i] > 0.0 and started > seats[i] + TOLERANCE)


@njit(cache=True)
def first_missed(taken: BoolArray, demand: Demand, supply: Supply) -> tuple[int, float]:
    """Position of the first deadline that a set misses, -1 for none; and the budget left at the last deadline.

    Between two deadlines the budget grows by the prefill rate beside the decodes of then, and by what decodes lend.
    Serving a request spends its tokens and adds a decode.
    """
    lent = lent_until(demand, supply)
    counts = supply.counts.copy()
    rate, budget, last_s, last_lent = rate_beside(counts, supply), 0.0, supply.start_s, 0.0
    for i in range(len(taken)):
        due_s = max(demand.due_s[i], last_s)
        budget += rate * (due_s - last_s) + lent[i] - last_lent
        last_s, last_lent = due_s, lent[i]
        if not taken[i]:
            continue
        if rate < 0.0:
            return i, budget
        budget -= demand.tokens[i]
        counts[demand.tier[i]] += 1.0
        rate = rate_beside(counts, supply)
        if budget < -TOLERANCE or rate < 0.0:
            return i, budget
    return -1, budget


@njit(cache=True)
def first_unseated(taken: BoolArray, demand: Demand, supply: Supply) -> int:
    """Position of the first of a set that finds no seat by when it must start, -1 for none."""
    started, seats = 0.0, seats_until(demand, supply)
    for i in range(len(taken)):
        if taken[i]:
            started += demand.needs_seat[i]
            if unseated(demand, i, started, seats):
                return i
    return -1


@in_place
def first_short(taken: BoolArray, demand: Demand, supply: Supply) -> int:
    """The first moment at which a set needs more KV blocks than there are, -1 for none: the rule of memory."""
    for k in range(len(supply.blocks)):
        used = 0.0
        for i in range(len(taken)):
            used += demand.blocks[i, k] if taken[i] else 0.0
        if used > supply.blocks[k] + TOLERANCE:
            return k
    return -1


@njit(cache=True)
def fits(taken: BoolArray, demand: Demand, supply: Supply) -> bool:
    """Whether a set of requests can be served in time, seated and held in memory."""
    if first_short(taken, demand, supply) >= 0 or first_unseated(taken, demand, supply) >= 0:
        return False
    return first_missed(taken, demand, supply)[0] < 0
