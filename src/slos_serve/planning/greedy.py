"""A feasible set of requests found quickly: the first bound of Algorithm 1, and its answer beyond its budget of work.

Moore and Hodgson's rule: walk the deadlines with everybody, and where one is missed drop the costliest request for its
weight.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.planning.demand import Demand
from slos_serve.planning.feasible import TOLERANCE, lent_until, seats_until, unseated
from slos_serve.planning.state import BoolArray
from slos_serve.planning.supply import Supply, rate_beside


@njit(cache=True)
def drop_for_memory(demand: Demand, supply: Supply, taken: BoolArray) -> bool:
    """Drop the requests that need most memory for their weight until every moment fits; False when it never does."""
    for k in range(len(supply.blocks)):
        need = demand.blocks[:, k]
        used = need[taken].sum()
        for i in np.argsort(-need / demand.weight, kind="mergesort"):
            if used <= supply.blocks[k] + TOLERANCE:
                break
            if taken[i] and not demand.promised[i] and need[i] > 0.0:
                taken[i] = False
                used -= need[i]
        if used > supply.blocks[k] + TOLERANCE:
            return False
    return True


@njit(cache=True)
def drop_for_time(demand: Demand, supply: Supply, taken: BoolArray) -> bool:
    """Walk the deadlines; at each that is missed, or whose request finds no seat, drop the costliest for its weight so
    far; False when none can go.

    The requests kept so far form a chain with the budget and the counts after each, so a drop is reckoned from its
    place on. Dropping never makes an earlier deadline miss, because no decode adds to the rate.
    """
    n, tiers = len(taken), len(supply.counts)
    lent, seats, cost = lent_until(demand, supply), seats_until(demand, supply), demand.tokens / demand.weight
    chain, counts = np.empty(n, dtype=np.int64), np.empty((n + 1, tiers))
    at_s, budget, rate, paid, started = np.zeros((5, n + 1))
    counts[0], at_s[0] = supply.counts, supply.start_s
    rate[0] = rate_beside(counts[0], supply)
    size = 0
    for i in range(n):
        if not taken[i]:
            continue
        chain[size] = i
        first, size = size, size + 1
        while True:
            for j in range(first, size):  # state j + 1 is the one after request chain[j]
                item = chain[j]
                at_s[j + 1], paid[j + 1] = max(demand.due_s[item], at_s[j]), lent[item]
                budget[j + 1] = budget[j] + rate[j] * (at_s[j + 1] - at_s[j]) + paid[j + 1] - paid[j]
                budget[j + 1] -= demand.tokens[item]
                started[j + 1] = started[j] + demand.needs_seat[item]
                counts[j + 1] = counts[j]
                counts[j + 1, demand.tier[item]] += 1.0
                rate[j + 1] = rate_beside(counts[j + 1], supply)
            in_time = min(rate[size - 1], rate[size]) >= 0.0 and budget[size] >= -TOLERANCE
            if in_time and not unseated(demand, chain[size - 1], started[size], seats):
                break
            worst = -1
            for j in range(size):
                if not demand.promised[chain[j]] and (worst < 0 or cost[chain[j]] > cost[chain[worst]]):
                    worst = j
            if worst < 0:
                return False
            taken[chain[worst]] = False
            for j in range(worst, size - 1):
                chain[j] = chain[j + 1]
            first, size = worst, size - 1
            if worst == size:
                break  # the newest went: what stands before it fitted already
    return True


@njit(cache=True)
def greedy(demand: Demand, supply: Supply) -> tuple[BoolArray, bool]:
    """A feasible set found quickly; False when the promised requests alone do not fit."""
    taken = np.ones(len(demand.slots), dtype=np.bool_)
    if not drop_for_memory(demand, supply, taken) or not drop_for_time(demand, supply, taken):
        return np.zeros(len(taken), dtype=np.bool_), False
    return taken, True
