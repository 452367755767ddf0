"""When a set of requests fits, and feasible sets that are found quickly.

:func:`first_violation` is the feasibility rule of admission (see :mod:`slos_serve.planning.admission_kernel`). The
greedy pass takes everybody and drops, where memory or a deadline does not hold, the costliest for its weight: the first
set of the dynamic program, which stands in when that makes too many labels.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.planning.prefill_rate import BoolArray, FloatArray, IntArray, prefill_rate

TOLERANCE = 1e-6


@njit(cache=True)
def first_violation(
    taken: BoolArray,
    due_s: FloatArray,
    cost_tokens: FloatArray,
    tier: IntArray,
    base_counts: FloatArray,
    periods_s: FloatArray,
    tokens_each: FloatArray,
    extra_s_each: FloatArray,
    draft_s: float,
    coefficients: FloatArray,
    max_tokens: float,
    start_s: float,
) -> tuple[int, float]:
    """Position of the first deadline a set misses (or -1), and the budget that remains at the last deadline of all.

    This is the feasibility rule itself, shared by the greedy pass, the tests' brute force and the router's mirrors.
    """
    counts = base_counts.copy()
    rate = prefill_rate(counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens)
    budget = 0.0
    last_s = start_s
    for i in range(len(taken)):
        budget += rate * max(due_s[i] - last_s, 0.0)
        last_s = max(due_s[i], last_s)
        if not taken[i]:
            continue
        if rate < 0.0:
            return i, budget
        budget -= cost_tokens[i]
        counts[tier[i]] += 1.0
        rate = prefill_rate(counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens)
        if budget < -TOLERANCE or rate < 0.0:
            return i, budget
    return -1, budget


@njit(cache=True)
def drop_for_memory(
    memory: FloatArray, weight: FloatArray, must: BoolArray, memory_room: FloatArray, taken: BoolArray
) -> bool:
    """Drop who needs most memory for its weight until all left fit at each checkpoint; False when musts do not."""
    n = len(taken)
    for k in range(len(memory_room)):
        used = 0.0
        for i in range(n):
            if taken[i]:
                used += memory[i, k]
        if used <= memory_room[k] + TOLERANCE:
            continue
        for i in np.argsort(-memory[:, k] / weight, kind="mergesort"):
            if taken[i] and not must[i] and memory[i, k] > 0.0:
                taken[i] = False
                used -= memory[i, k]
                if used <= memory_room[k] + TOLERANCE:
                    break
        if used > memory_room[k] + TOLERANCE:
            return False
    return True


@njit(cache=True)
def _push(heap: IntArray, size: int, item: int, rank: IntArray) -> None:
    """Put ``item`` into a heap of ``size`` whose top has the highest rank."""
    at = size
    while at > 0 and rank[heap[(at - 1) // 2]] < rank[item]:
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = item


@njit(cache=True)
def _pop(heap: IntArray, size: int, rank: IntArray) -> int:
    """Take the top of a heap of ``size``."""
    top, item = heap[0], heap[size - 1]
    at = 0
    while 2 * at + 1 < size - 1:
        child = 2 * at + 1
        if child + 1 < size - 1 and rank[heap[child + 1]] > rank[heap[child]]:
            child += 1
        if rank[heap[child]] <= rank[item]:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = item
    return int(top)


@njit(cache=True)
def drop_for_time(
    due_s: FloatArray,
    cost_tokens: FloatArray,
    tier: IntArray,
    weight: FloatArray,
    must: BoolArray,
    base_counts: FloatArray,
    periods_s: FloatArray,
    tokens_each: FloatArray,
    extra_s_each: FloatArray,
    draft_s: float,
    coefficients: FloatArray,
    max_tokens: float,
    start_s: float,
    taken: BoolArray,
) -> bool:
    """Walk the deadlines; at each that is missed drop the costliest for its weight so far; False when musts miss.

    Those taken form a chain, each with budget, counts and rate right after it is served: a drop is reckoned again from
    where it stood, not from the start. Dropping never makes an earlier deadline miss, because nobody's decodes add to
    the rate.
    """
    n = len(due_s)
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(cost_tokens / weight, kind="mergesort")] = np.arange(n)
    heap, size = np.empty(n, dtype=np.int64), 0
    before, after = np.empty(n + 1, dtype=np.int64), np.empty(n + 1, dtype=np.int64)  # the chain begins at n
    at_s, budget, rate = np.empty(n + 1), np.empty(n + 1), np.empty(n + 1)
    counts = np.empty((n + 1, len(base_counts)))
    counts[n] = base_counts
    at_s[n], budget[n] = start_s, 0.0
    rate[n] = prefill_rate(base_counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens)
    last = n
    for i in range(n):
        if not taken[i]:
            continue
        if not must[i]:
            _push(heap, size, i, rank)
            size += 1
        before[i], after[last] = last, i
        first = i
        last = i
        while True:
            fits, at = True, first
            while True:
                previous = before[at]
                at_s[at] = max(due_s[at], at_s[previous])
                budget[at] = budget[previous] + rate[previous] * (at_s[at] - at_s[previous]) - cost_tokens[at]
                counts[at] = counts[previous]
                counts[at, tier[at]] += 1.0
                rate[at] = prefill_rate(
                    counts[at], periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens
                )
                fits = fits and rate[previous] >= 0.0 and rate[at] >= 0.0 and budget[at] >= -TOLERANCE
                if at == last:
                    break
                at = after[at]
            if fits:
                break
            if size == 0:
                return False
            worst = _pop(heap, size, rank)
            size -= 1
            taken[worst] = False
            if worst == last:
                last = before[worst]
                break
            first = after[worst]
            before[first] = before[worst]
            after[before[worst]] = first
    return True


@njit(cache=True)
def admit_in_turn(
    order: IntArray,
    due_s: FloatArray,
    cost_tokens: FloatArray,
    tier: IntArray,
    memory: FloatArray,
    must: BoolArray,
    base_counts: FloatArray,
    periods_s: FloatArray,
    tokens_each: FloatArray,
    extra_s_each: FloatArray,
    draft_s: float,
    coefficients: FloatArray,
    max_tokens: float,
    start_s: float,
    memory_room: FloatArray,
) -> BoolArray:
    """What :func:`admit` is measured against: one request after the other in ``order``, each that still fits."""
    taken = must.copy()
    for i in order:
        if must[i]:
            continue
        taken[i] = True
        at, _ = first_violation(
            taken, due_s, cost_tokens, tier, base_counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients,
            max_tokens, start_s,
        )  # fmt: skip
        fits = at < 0
        for k in range(len(memory_room)):
            fits = fits and memory[taken, k].sum() <= memory_room[k] + TOLERANCE
        taken[i] = fits
    return taken
