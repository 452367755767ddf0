"""Algorithm 1: which requests to admit (the paper's section 4; docs/scheduling.md, "Admission").

Requests stand in the order of their first-token deadlines. Between two deadlines the prefill budget grows by the rate
that the admitted decodes leave; serving a request spends its prefill and raises the decode count of its tier from then
on. The recurrence, with PB the largest prefill budget that is left:

     1  PB(0, no one, no memory) = 0
     2  for each request i in the order of deadlines:
     3      for each state (admitted per tier N, memory M, value V):
     4          budget = PB(i - 1, N, M, V) + rate(N) * (due(i) - due(i - 1)) + what decodes lend between the two
     5          leave i out, unless it is promised:       PB(i, N, M, V) = budget
     6          take i, where the budget covers it, memory and seats suffice and the decodes fit:
     7                  PB(i, N + tier(i), M + blocks(i), V + weight(i)) = budget - tokens(i)
     8          of states with equal N keep those that no other beats in V, PB and M together
     9  the answer is the state with the largest V; among equals, with the largest PB

All requests are there from the start, so a budget that is left carries over. The greedy set
(:mod:`slos_serve.planning.greedy`) is the first answer; states that cannot beat the best set found are dropped
(:mod:`slos_serve.planning.pruning`). The program is exact within its budget of work, which is counted, not timed: the
same view gives the same plan on every machine. Beyond the budget the best set found so far stands, which is never worse
than the greedy one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.perf.jit import in_place
from slos_serve.planning.demand import Demand
from slos_serve.planning.feasible import TOLERANCE, first_missed, unseated
from slos_serve.planning.greedy import greedy
from slos_serve.planning.pruning import Bounds, bounds_of, cannot_win
from slos_serve.planning.state import BoolArray, FloatArray, IntArray
from slos_serve.planning.supply import Supply, rate_beside

EXACT, STOPPED, INFEASIBLE = 0, 1, 2
# Work of one program: states made (four each), visited and compared with (one each). About half a millisecond.
MOST_WORK = 6_000
WORK_OF_A_STATE = 4
_HASHES, _FOR_EVER = 4096, 1 << 40


class Admitted(NamedTuple):
    """An answer.

    Attributes:
        taken: bool [n], who is admitted; the promised ones alone when ``status`` is ``INFEASIBLE`` (they do not fit).
        value: weight of the taken ones.
        budget: prefill tokens left at the last deadline.
        status: ``EXACT``, ``STOPPED`` (the best set found within the budget of work) or ``INFEASIBLE``.
        labels: states that the program made.
    """

    taken: BoolArray
    value: float
    budget: float
    status: int
    labels: int


class Labels(NamedTuple):
    """States of the program, one a row. ``budget`` is what a state would have at the start had its rate always held.

    Attributes:
        key: int64 [m], admitted per tier as one number; parent, item: int64 [m], how the state was reached.
        following: int64 [m], the next older state in the same hash.
        last: int64 [m], the last request that a state is extended with, once another state beats it.
        value, budget, rate: float64 [m]; started: float64 [m], requests that need a seat; used: float64 [m, K], KV
            blocks.
    """

    key: IntArray
    parent: IntArray
    item: IntArray
    following: IntArray
    last: IntArray
    value: FloatArray
    budget: FloatArray
    rate: FloatArray
    started: FloatArray
    used: FloatArray


@njit(cache=True)
def empty_labels(most: int, supply: Supply) -> Labels:
    """Room for ``most`` states; the first one admits nobody (line 1)."""
    links = np.full((5, most), -1, dtype=np.int64)
    links[0, 0], links[4, :] = 0, _FOR_EVER
    sizes = np.zeros((4, most))
    sizes[2, 0] = rate_beside(supply.counts, supply)
    used = np.zeros((most, len(supply.blocks)))
    return Labels(links[0], links[1], links[2], links[3], links[4], sizes[0], sizes[1], sizes[2], sizes[3], used)


@njit(cache=True)
def traced(labels: Labels, best: int, count: int) -> BoolArray:
    """bool [count]: the requests that the state ``best`` takes."""
    taken = np.zeros(count, dtype=np.bool_)
    while best > 0:
        taken[labels.item[best]] = True
        best = labels.parent[best]
    return taken


@in_place
def compare(labels: Labels, new: int, first: int, oldest: int) -> tuple[bool, int]:
    """Line 8: whether a state as old as ``oldest`` or younger beats the new one, and states looked at.

    States that the new one beats end here. ``first`` begins the list of states in the new one's hash.
    """
    other, looked, i = first, 0, labels.item[new]
    while other >= oldest and other >= 0:
        looked += 1
        if labels.key[other] == labels.key[new] and labels.last[other] > i:
            value, budget = labels.value[other] - labels.value[new], labels.budget[other] - labels.budget[new]
            better, worse = value >= -1e-12 and budget >= -1e-9, value <= 1e-12 and budget <= 1e-9
            for k in range(labels.used.shape[1]):
                better = better and labels.used[other, k] <= labels.used[new, k] + 1e-9
                worse = worse and labels.used[other, k] >= labels.used[new, k] - 1e-9
            if better:
                return True, looked
            if worse:
                labels.last[other] = i
        other = labels.following[other]
    return False, looked


@njit(cache=True)
def take(labels: Labels, parent: int, new: int, i: int, demand: Demand, supply: Supply, bounds: Bounds) -> bool:
    """Lines 4, 6 and 7: write the state that takes request i after ``parent``; False when it is not feasible."""
    since_s, rate = bounds.since_s[i], labels.rate[parent]
    budget = labels.budget[parent] + rate * since_s - demand.tokens[i]
    labels.started[new] = labels.started[parent] + demand.needs_seat[i]
    if rate < 0.0 or budget + bounds.lent[i] < -TOLERANCE or unseated(demand, i, labels.started[new], bounds.seats):
        return False
    for k in range(len(supply.blocks)):
        labels.used[new, k] = labels.used[parent, k] + demand.blocks[i, k]
        if labels.used[new, k] > supply.blocks[k] + TOLERANCE:
            return False
    labels.key[new] = left = labels.key[parent] + bounds.stride[demand.tier[i]]
    counts = supply.counts.copy()
    for tier in range(len(counts) - 1, -1, -1):
        counts[tier] += left // bounds.stride[tier]
        left = left % bounds.stride[tier]
    rate = rate_beside(counts, supply)
    labels.rate[new], labels.parent[new], labels.item[new] = rate, parent, i
    labels.value[new], labels.budget[new] = labels.value[parent] + demand.weight[i], budget - rate * since_s
    labels.last[new] = _FOR_EVER
    return bool(rate >= 0.0)


@njit(cache=True)
def program(demand: Demand, supply: Supply, first: BoolArray, most_work: int) -> Admitted:
    """The recurrence, from the feasible set ``first`` on."""
    n, weight = len(first), demand.weight
    best_value, best_budget, best = weight[first].sum(), first_missed(first, demand, supply)[1], -1
    bounds = bounds_of(demand, supply)
    end_s, lent_at_end = bounds.since_s[n - 1], bounds.lent[n - 1]
    labels = empty_labels(most_work // WORK_OF_A_STATE + 2, supply)
    heads = np.full(_HASHES, -1, dtype=np.int64)
    heads[0] = 0
    made, alive, work, status = 1, 0, 0, EXACT
    for i in range(n):  # line 2
        stop = made
        for parent in range(alive, stop):  # line 3
            work += 1
            if labels.last[parent] < i:
                continue
            at_end = labels.budget[parent] + labels.rate[parent] * end_s
            started = labels.started[parent]
            if cannot_win(bounds, i, labels.value[parent], at_end, started, best_value, best_budget):
                labels.last[parent] = i
                continue
            work += WORK_OF_A_STATE
            if work > most_work:
                status = STOPPED
                break
            if not take(labels, parent, made, i, demand, supply, bounds):
                continue
            place = labels.key[made] % _HASHES
            beaten, looked = compare(labels, made, heads[place], stop if demand.promised[i] else alive)
            work += looked
            if beaten:
                continue
            labels.following[made], heads[place] = heads[place], made
            if bounds.promised_weight[i + 1] == 0.0:  # line 9
                budget = labels.budget[made] + labels.rate[made] * end_s + lent_at_end
                value = labels.value[made]
                if value > best_value + 1e-12 or (value >= best_value - 1e-12 and budget > best_budget):
                    best, best_value, best_budget = made, value, budget
            made += 1
        if status == STOPPED:
            break
        if demand.promised[i]:
            alive = stop  # line 5: states without a promised request end here
    return Admitted(traced(labels, best, n) if best >= 0 else first, best_value, best_budget, status, made - 1)


@njit(cache=True)
def admit(demand: Demand, supply: Supply, most_work: int) -> Admitted:
    """The feasible set of largest total weight, ties by the budget that is left.

    Args:
        most_work: see ``MOST_WORK``; 0 answers with the greedy set.
    """
    first, feasible = greedy(demand, supply)
    if not feasible:
        return Admitted(demand.promised.copy(), 0.0, 0.0, INFEASIBLE, 0)
    if first.all() or most_work <= 0:
        budget = first_missed(first, demand, supply)[1]
        return Admitted(first, demand.weight[first].sum(), budget, EXACT if first.all() else STOPPED, 0)
    return program(demand, supply, first, most_work)
