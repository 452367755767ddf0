"""Algorithm 1: which new requests to admit, by dynamic programming over first-token deadlines (design 4.2).

Requests stand in deadline order. Between two deadlines the prefill budget grows by ``rate(counts) * interval``; serving
a request spends its prefill tokens and raises its tier's decode count from then on. A state is (position, admitted per
tier, memory); its worth is the remaining budget. Every request is present from the start of the plan, so work done
before a deadline may belong to any of them, and budget carries over.

States are labels (counts, value, budget, memory at each checkpoint). A label is dropped when another with the same
counts is at least as good in every respect, when its budget is negative, its memory over, its decodes alone do not
fit, or when taking every remaining request could not lift it to the value that a greedy pass already reached. None of
these drops an optimum, so the answer is exact as long as the number of labels stays under ``max_labels``; past that the
greedy answer, which is feasible, stands in.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.planning.prefill_rate import FloatArray, IntArray, prefill_rate

EXACT, GREEDY, INFEASIBLE = 0, 1, 2
TOLERANCE = 1e-6
_NOT_COMPUTED = np.inf
BoolArray = NDArray[np.bool_]


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
def _greedy(  # noqa: C901 - memory and time are one loop each
    due_s: FloatArray,
    cost_tokens: FloatArray,
    tier: IntArray,
    memory: FloatArray,
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
    memory_room: FloatArray,
    taken: BoolArray,
) -> bool:
    """Take all, then drop the costliest for its weight before each violation; False when the musts do not fit."""
    n = len(due_s)
    taken[:] = True
    for k in range(len(memory_room)):
        while True:
            used = 0.0
            for i in range(n):
                if taken[i]:
                    used += memory[i, k]
            if used <= memory_room[k] + TOLERANCE:
                break
            worst = -1
            for i in range(n):
                if not taken[i] or must[i] or memory[i, k] <= 0.0:
                    continue
                if worst < 0 or memory[i, k] * weight[worst] > memory[worst, k] * weight[i]:
                    worst = i
            if worst < 0:
                return False
            taken[worst] = False
    while True:
        at, _ = first_violation(
            taken, due_s, cost_tokens, tier, base_counts, periods_s, tokens_each, extra_s_each, draft_s,
            coefficients, max_tokens, start_s,
        )  # fmt: skip
        if at < 0:
            return True
        worst = -1
        for i in range(at + 1):
            if not taken[i] or must[i]:
                continue
            if worst < 0 or cost_tokens[i] * weight[worst] >= cost_tokens[worst] * weight[i]:
                worst = i
        if worst < 0:
            return False
        taken[worst] = False


@njit(cache=True)
def admit(  # noqa: C901 - one kernel: labels live in arrays that no call boundary should copy
    due_s: FloatArray,
    cost_tokens: FloatArray,
    tier: IntArray,
    memory: FloatArray,
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
    memory_room: FloatArray,
    max_labels: int,
) -> tuple[BoolArray, float, float, int, int]:
    """Choose the feasible set of largest total weight, ties by remaining budget.

    Args:
        due_s: float64 [n], first-token deadlines, ascending.
        cost_tokens: float64 [n], prefill tokens left (attention counted in).
        tier: int64 [n], decode tier each enters.
        memory: float64 [n, K], KV need of each at K checkpoints in time.
        weight: float64 [n], value of admitting each; > 0.
        must: bool [n], already promised.
        base_counts: float64 [L], decodes that run already.
        periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens: see :func:`prefill_rate`.
        start_s: when the plan begins.
        memory_room: float64 [K], KV left at each checkpoint for the n requests together.
        max_labels: most labels to make before the greedy answer stands in.

    Returns:
        taken (bool [n]), total weight, remaining budget (tokens), status (EXACT, GREEDY or INFEASIBLE: the musts alone
        do not fit and nothing is taken), labels made.
    """
    n = len(due_s)
    tiers = len(base_counts)
    checkpoints = len(memory_room)
    taken = np.zeros(n, dtype=np.bool_)
    if not _greedy(
        due_s, cost_tokens, tier, memory, weight, must, base_counts, periods_s, tokens_each, extra_s_each, draft_s,
        coefficients, max_tokens, start_s, memory_room, taken,
    ):  # fmt: skip
        taken[:] = False
        return taken, 0.0, 0.0, INFEASIBLE, 0
    _, greedy_budget = first_violation(
        taken, due_s, cost_tokens, tier, base_counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients,
        max_tokens, start_s,
    )  # fmt: skip
    greedy_value = 0.0
    total = 0.0
    for i in range(n):
        total += weight[i]
        if taken[i]:
            greedy_value += weight[i]
    if greedy_value >= total - 1e-12:
        return taken, greedy_value, greedy_budget, EXACT, 0

    # Mixed-radix keys over admitted counts per tier.
    stride = np.ones(tiers + 1, dtype=np.int64)
    for level in range(tiers):
        in_tier = 0
        for i in range(n):
            if tier[i] == level:
                in_tier += 1
        stride[level + 1] = stride[level] * (in_tier + 1)
    num_keys = stride[tiers]
    if num_keys > 4_000_000:
        return taken, greedy_value, greedy_budget, GREEDY, 0
    key_rate = np.full(num_keys, _NOT_COMPUTED)
    bucket = np.full(num_keys, -1, dtype=np.int64)
    bucket_item = np.full(num_keys, -1, dtype=np.int64)

    size = max_labels + 2
    label_key = np.empty(size, dtype=np.int64)
    label_value = np.empty(size)
    label_budget = np.empty(size)
    label_memory = np.empty((size, checkpoints))
    label_parent = np.empty(size, dtype=np.int64)
    label_item = np.empty(size, dtype=np.int64)
    label_next = np.empty(size, dtype=np.int64)
    label_dead = np.zeros(size, dtype=np.bool_)

    counts = np.empty(tiers)
    label_key[0] = 0
    label_value[0] = 0.0
    label_budget[0] = 0.0
    label_memory[0, :] = 0.0
    label_parent[0] = -1
    label_item[0] = -1
    key_rate[0] = prefill_rate(base_counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens)
    layer_start, layer_end = 0, 1
    rest = total
    last_s = start_s
    for i in range(n):
        rest -= weight[i]
        interval_s = max(due_s[i] - last_s, 0.0)
        last_s = max(due_s[i], last_s)
        made = layer_end
        # First the labels that serve i, then those that do not: a later one may be dominated by an earlier one.
        for serve in range(2):
            if serve == 1 and must[i]:
                break
            for parent in range(layer_start, layer_end):
                if label_dead[parent]:
                    continue
                key = label_key[parent]
                rate = key_rate[key]
                if rate < 0.0:
                    continue
                budget = label_budget[parent] + rate * interval_s
                value = label_value[parent]
                if serve == 0:
                    budget -= cost_tokens[i]
                    if budget < -TOLERANCE:
                        continue
                    value += weight[i]
                    key += stride[tier[i]]
                    if key_rate[key] == _NOT_COMPUTED:
                        left = key
                        for level in range(tiers - 1, -1, -1):
                            counts[level] = base_counts[level] + left // stride[level]
                            left = left % stride[level]
                        key_rate[key] = prefill_rate(
                            counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens
                        )
                    if key_rate[key] < 0.0:
                        continue
                    over = False
                    for k in range(checkpoints):
                        if label_memory[parent, k] + memory[i, k] > memory_room[k] + TOLERANCE:
                            over = True
                            break
                    if over:
                        continue
                if value + rest < greedy_value - 1e-12:
                    continue
                if bucket_item[key] != i:
                    bucket_item[key] = i
                    bucket[key] = -1
                # Dominance among the labels of this layer with the same counts.
                dominated = False
                other = bucket[key]
                before = -1
                while other >= 0:
                    better = label_value[other] >= value - 1e-12 and label_budget[other] >= budget - 1e-9
                    worse = label_value[other] <= value + 1e-12 and label_budget[other] <= budget + 1e-9
                    for k in range(checkpoints):
                        mine = label_memory[parent, k]
                        if serve == 0:
                            mine += memory[i, k]
                        if label_memory[other, k] > mine + 1e-9:
                            better = False
                        if label_memory[other, k] < mine - 1e-9:
                            worse = False
                    if better:
                        dominated = True
                        break
                    following = label_next[other]
                    if worse:
                        label_dead[other] = True
                        if before < 0:
                            bucket[key] = following
                        else:
                            label_next[before] = following
                    else:
                        before = other
                    other = following
                if dominated:
                    continue
                if made >= max_labels:
                    return taken, greedy_value, greedy_budget, GREEDY, made
                label_key[made] = key
                label_value[made] = value
                label_budget[made] = budget
                for k in range(checkpoints):
                    label_memory[made, k] = label_memory[parent, k] + (memory[i, k] if serve == 0 else 0.0)
                label_parent[made] = parent
                label_item[made] = i if serve == 0 else -1
                label_dead[made] = False
                label_next[made] = bucket[key]
                bucket[key] = made
                made += 1
        layer_start, layer_end = layer_end, made
        if layer_start == layer_end:
            break

    best = -1
    for label in range(layer_start, layer_end):
        if label_dead[label]:
            continue
        worth = label_value[label] - label_value[best] if best >= 0 else 1.0
        if worth > 1e-12 or (worth >= -1e-12 and label_budget[label] > label_budget[best]):
            best = label
    if best < 0:
        return taken, greedy_value, greedy_budget, GREEDY, layer_end
    taken[:] = False
    value, budget = label_value[best], label_budget[best]
    label = best
    while label >= 0:
        if label_item[label] >= 0:
            taken[label_item[label]] = True
        label = label_parent[label]
    return taken, value, budget, EXACT, layer_end
