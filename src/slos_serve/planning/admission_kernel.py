"""Algorithm 1: which new requests to admit, by dynamic programming over first-token deadlines (design 4.2).

Requests stand in deadline order. Between two deadlines the prefill budget grows by ``rate(counts) * interval``; serving
a request spends its prefill tokens and raises its tier's decode count from then on. A state is (position, admitted per
tier, memory); its worth is the remaining budget. Every request is present from the start of the plan, so work done
before a deadline may belong to any of them, and budget carries over.

States are labels (counts, value, budget, memory at each checkpoint). A label is dropped when another with the same
counts is at least as good in every respect, when its budget is negative, its memory over, its decodes alone do not
fit, or when not even the cheapest of the requests still to come could lift it to the best set found so far (a greedy
one at first). That bound counts on the prefill rate never rising with another decode. None of these drops an optimum,
so the answer is exact as long as the number of labels stays under ``max_labels``; past that the best set found so far,
which is feasible, stands in.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.planning.greedy_set import TOLERANCE, drop_for_memory, drop_for_time, first_violation
from slos_serve.planning.prefill_rate import BoolArray, FloatArray, IntArray, prefill_rate

EXACT, GREEDY, INFEASIBLE = 0, 1, 2
# Columns of what the program keeps: an entry a key, a label's links, a label's sizes (one column a checkpoint).
KEY, BUCKET, ROUND = range(3)
ENTRY, PARENT, ITEM, NEXT, DEAD = range(5)
VALUE, BUDGET, MEMORY = range(3)


@njit(cache=True)
def _could_fit(
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
    """Who might be taken beside the musts alone; nobody else can be in any set. Musts are True."""
    n = len(due_s)
    counts = base_counts.copy()
    rate = prefill_rate(counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens)
    found = np.ones(n, dtype=np.bool_)
    spare = np.empty(n)
    room = memory_room.copy()
    budget, last_s = 0.0, start_s
    for i in range(n):
        budget += rate * max(due_s[i] - last_s, 0.0)
        last_s = max(due_s[i], last_s)
        if must[i]:
            budget -= cost_tokens[i]
            counts[tier[i]] += 1.0
            rate = prefill_rate(counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens)
            room -= memory[i]
        spare[i] = budget
    least = np.inf
    for i in range(n - 1, -1, -1):
        if must[i]:
            least = min(least, spare[i])
            continue
        found[i] = cost_tokens[i] <= min(least, spare[i]) + 2.0 * TOLERANCE
        for k in range(len(room)):
            found[i] = found[i] and memory[i, k] <= room[k] + 2.0 * TOLERANCE
    return found


@njit(cache=True)
def _most_within(room: float, need: FloatArray, worth: FloatArray, count: int, unit: float) -> float:
    """Most worth that fits into ``room``: running sums [count + 1] of the cheapest first, the last one in part.

    With ``unit`` > 0 every worth is that, and parts are worth nothing.
    """
    if room < 0.0:
        return 0.0
    at = int(np.searchsorted(need[: count + 1], room, side="right")) - 1
    if at >= count or unit > 0.0:
        return float(worth[min(at, count)])
    part = (room - need[at]) / (need[at + 1] - need[at])
    return float(worth[at] + part * (worth[at + 1] - worth[at]))


@njit(cache=True)
def _least_for(value: float, need: FloatArray, worth: FloatArray, count: int, unit: float) -> float:
    """Least need of anything worth ``value``; inf when all together are worth less."""
    if value <= 1e-12:
        return 0.0
    if value > worth[count] + 1e-9:
        return np.inf
    at = min(int(np.searchsorted(worth[: count + 1], value - 1e-9, side="left")), count)
    if unit > 0.0:
        return float(need[at])
    part = min((value - worth[at - 1]) / (worth[at] - worth[at - 1]), 1.0)
    return float(need[at - 1] + part * (need[at] - need[at - 1]))


@njit(cache=True)
def _running_sums(
    order: IntArray,
    first: int,
    open_: BoolArray,
    need: FloatArray,
    weight: FloatArray,
    sums: FloatArray,
    worth: FloatArray,
) -> int:
    """Sums of need and weight over the open requests from ``first`` on, cheapest first; returns how many there are."""
    count = 0
    sums[0], worth[0] = 0.0, 0.0
    for i in order:
        if i >= first and open_[i]:
            sums[count + 1] = sums[count] + need[i]
            worth[count + 1] = worth[count] + weight[i]
            count += 1
    return count


@njit(cache=True)
def _grown_floats(old: FloatArray) -> FloatArray:
    new = np.empty((2 * len(old), old.shape[1]))
    new[: len(old)] = old
    return new


@njit(cache=True)
def _grown_ints(old: IntArray) -> IntArray:
    new = np.empty((2 * len(old), old.shape[1]), dtype=np.int64)
    new[: len(old)] = old
    return new


@njit(cache=True)
def _place(key: int, table: IntArray, entries: IntArray) -> int:
    """Where ``key`` stands in an open-addressed table of positions in ``entries``, or the free place for it."""
    mask = len(table) - 1
    at = (key * 0x9E3779B1 >> 12) & mask
    while table[at] >= 0 and entries[table[at], KEY] != key:
        at = (at + 1) & mask
    return int(at)


@njit(cache=True)
def _traced(best: int, labels: IntArray, greedy: BoolArray) -> BoolArray:
    """The set of label ``best``; that of the greedy pass when no label beat it (-1)."""
    if best < 0:
        return greedy
    taken = np.zeros(len(greedy), dtype=np.bool_)
    label = best
    while label >= 0:
        if labels[label, ITEM] >= 0:
            taken[labels[label, ITEM]] = True
        label = labels[label, PARENT]
    return taken


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
        memory: float64 [n, K], KV need of each at K checkpoints in time, >= 0.
        weight: float64 [n], value of admitting each; > 0.
        must: bool [n], already promised.
        base_counts: float64 [L], decodes that run already.
        periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens: see :func:`prefill_rate`.
        start_s: when the plan begins.
        memory_room: float64 [K], KV left at each checkpoint for the n requests together.
        max_labels: most labels to make before the best set found so far stands in.

    Returns:
        taken (bool [n]), total weight, remaining budget (tokens), status (EXACT, GREEDY or INFEASIBLE: the musts alone
        do not fit and nothing is taken), labels made.
    """
    n, tiers, checkpoints = len(due_s), len(base_counts), len(memory_room)
    taken = np.ones(n, dtype=np.bool_)
    if not drop_for_memory(memory, weight, must, memory_room, taken) or not drop_for_time(
        due_s, cost_tokens, tier, weight, must, base_counts, periods_s, tokens_each, extra_s_each, draft_s,
        coefficients, max_tokens, start_s, taken,
    ):  # fmt: skip
        taken[:] = False
        return taken, 0.0, 0.0, INFEASIBLE, 0
    _, best_budget = first_violation(
        taken, due_s, cost_tokens, tier, base_counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients,
        max_tokens, start_s,
    )  # fmt: skip
    best_value = weight[taken].sum()
    if best_value >= weight.sum() - 1e-12:
        return taken, best_value, best_budget, EXACT, 0
    open_ = _could_fit(
        due_s, cost_tokens, tier, memory, must, base_counts, periods_s, tokens_each, extra_s_each, draft_s,
        coefficients, max_tokens, start_s, memory_room,
    )  # fmt: skip
    if not (open_ & ~taken).any():
        return taken, best_value, best_budget, EXACT, 0
    open_ &= ~must

    # Sums over the cheapest of those still to come bound what a label may reach, by budget and by each checkpoint.
    resources = 1 + checkpoints
    orders = np.empty((resources, n), dtype=np.int64)
    needs = np.empty((resources, n))
    needs[0] = cost_tokens
    for k in range(checkpoints):
        needs[1 + k] = memory[:, k]
    for r in range(resources):
        orders[r] = np.argsort(needs[r] / weight, kind="mergesort")
    sums, worths = np.empty((resources, n + 1)), np.empty((resources, n + 1))
    counted = 0
    must_needs, must_value, musts_left = np.zeros(resources), 0.0, 0
    unit = 0.0
    for i in range(n):
        if must[i]:
            must_needs += needs[:, i]
            must_value += weight[i]
            musts_left += 1
        elif open_[i]:
            unit = weight[i] if unit == 0.0 or unit == weight[i] else -1.0

    # Mixed-radix keys over admitted counts per tier; one entry a key: its rate and its labels.
    stride = np.ones(tiers + 1, dtype=np.int64)
    for level in range(tiers):
        in_tier = 0
        for i in range(n):
            if tier[i] == level and (must[i] or open_[i]):
                in_tier += 1
        stride[level + 1] = stride[level] * (in_tier + 1)
    table = np.full(1024, -1, dtype=np.int64)
    entries, rates, num_entries = np.empty((512, 3), dtype=np.int64), np.empty((512, 1)), 1
    entries[0, KEY], entries[0, BUCKET], entries[0, ROUND] = 0, 0, 0
    rates[0, 0] = prefill_rate(base_counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens)
    table[_place(0, table, entries)] = 0

    labels, sizes, made = np.empty((512, 5), dtype=np.int64), np.empty((512, 2 + checkpoints)), 1
    labels[0, ENTRY], labels[0, PARENT], labels[0, ITEM], labels[0, NEXT], labels[0, DEAD] = 0, -1, -1, -1, 0
    sizes[0] = 0.0
    live, num_live = np.zeros(512, dtype=np.int64), 1
    best = -1
    counts = np.empty(tiers)
    end_s = max(due_s[n - 1], start_s)
    rounds = 0
    since_counted = n
    for i in range(n):
        if not (must[i] or open_[i]):
            continue
        # Sums from an earlier request on are bounds too, only looser.
        since_counted += 1
        if since_counted * 32 > n:
            for r in range(resources):
                counted = _running_sums(orders[r], i, open_, needs[r], weight, sums[r], worths[r])
            since_counted = 0
        kept = 0
        for j in range(num_live):
            label = live[j]
            if labels[label, DEAD] == 1:
                continue
            value = sizes[label, VALUE] + must_value
            budget = sizes[label, BUDGET] + rates[labels[label, ENTRY], 0] * (end_s - start_s) - must_needs[0]
            ties = budget - _least_for(best_value - value, sums[0], worths[0], counted, unit) >= best_budget - TOLERANCE
            if not ties:
                within = _most_within(budget + 2.0 * TOLERANCE, sums[0], worths[0], counted, unit)
                if value + within <= best_value + 1e-9:
                    continue
            wins = True
            for k in range(checkpoints):
                room = memory_room[k] - sizes[label, MEMORY + k] - must_needs[1 + k] + 2.0 * TOLERANCE
                if value + _most_within(room, sums[1 + k], worths[1 + k], counted, unit) < best_value - 1e-9:
                    wins = False
                    break
            if wins:
                live[kept] = label
                kept += 1
        num_live = kept
        if must[i]:
            rounds += 1  # labels without i end here and must not stand in the way of those with it
            must_needs -= needs[:, i]
            must_value -= weight[i]
            musts_left -= 1
        since_s = max(due_s[i] - start_s, 0.0)
        num_new = 0
        for j in range(num_live):
            parent = live[j]
            entry = labels[parent, ENTRY]
            # Budgets are kept as they would stand at the start had the rate always been today's: labels of one entry
            # compare at any time.
            rate = rates[entry, 0]
            budget = sizes[parent, BUDGET] + rate * since_s - cost_tokens[i]
            if rate < 0.0 or budget < -TOLERANCE:
                continue
            over = False
            for k in range(checkpoints):
                over = over or sizes[parent, MEMORY + k] + memory[i, k] > memory_room[k] + TOLERANCE
            if over:
                continue
            key = entries[entry, KEY] + stride[tier[i]]
            place = _place(key, table, entries)
            if table[place] < 0:
                if 2 * (num_entries + 1) > len(table):
                    table = np.full(2 * len(table), -1, dtype=np.int64)
                    for e in range(num_entries):
                        table[_place(entries[e, KEY], table, entries)] = e
                    place = _place(key, table, entries)
                if num_entries == len(entries):
                    entries, rates = _grown_ints(entries), _grown_floats(rates)
                left = key
                for level in range(tiers - 1, -1, -1):
                    counts[level] = base_counts[level] + left // stride[level]
                    left = left % stride[level]
                rates[num_entries, 0] = prefill_rate(
                    counts, periods_s, tokens_each, extra_s_each, draft_s, coefficients, max_tokens
                )
                entries[num_entries, KEY], entries[num_entries, BUCKET], entries[num_entries, ROUND] = key, -1, rounds
                table[place] = num_entries
                num_entries += 1
            entry = table[place]
            if rates[entry, 0] < 0.0:
                continue
            if entries[entry, ROUND] != rounds:
                entries[entry, BUCKET], entries[entry, ROUND] = -1, rounds
            budget -= rates[entry, 0] * since_s
            value = sizes[parent, VALUE] + weight[i]
            dominated, previous, other = False, -1, entries[entry, BUCKET]
            while other >= 0:
                better = sizes[other, VALUE] >= value - 1e-12 and sizes[other, BUDGET] >= budget - 1e-9
                worse = sizes[other, VALUE] <= value + 1e-12 and sizes[other, BUDGET] <= budget + 1e-9
                for k in range(checkpoints):
                    mine = sizes[parent, MEMORY + k] + memory[i, k]
                    better = better and sizes[other, MEMORY + k] <= mine + 1e-9
                    worse = worse and sizes[other, MEMORY + k] >= mine - 1e-9
                if better:
                    dominated = True
                    break
                following = labels[other, NEXT]
                if worse:
                    labels[other, DEAD] = 1
                    if previous < 0:
                        entries[entry, BUCKET] = following
                    else:
                        labels[previous, NEXT] = following
                else:
                    previous = other
                other = following
            if dominated:
                continue
            if made > max_labels:
                return _traced(best, labels, taken), best_value, best_budget, GREEDY, made - 1
            if made == len(labels):
                labels, sizes = _grown_ints(labels), _grown_floats(sizes)
            labels[made, ENTRY], labels[made, PARENT], labels[made, ITEM] = entry, parent, i
            labels[made, NEXT], labels[made, DEAD] = entries[entry, BUCKET], 0
            sizes[made, VALUE], sizes[made, BUDGET] = value, budget
            for k in range(checkpoints):
                sizes[made, MEMORY + k] = sizes[parent, MEMORY + k] + memory[i, k]
            entries[entry, BUCKET] = made
            if num_live + num_new == len(live):
                live = np.concatenate((live, np.empty_like(live)))
            live[num_live + num_new] = made
            num_new += 1
            if musts_left == 0:
                budget += rates[entry, 0] * (end_s - start_s)
                if value > best_value + 1e-12 or (value >= best_value - 1e-12 and budget > best_budget):
                    best, best_value, best_budget = made, value, budget
            made += 1
        if must[i]:
            live[:num_new] = live[num_live : num_live + num_new].copy()
            num_live = num_new
        else:
            num_live += num_new
    return _traced(best, labels, taken), best_value, best_budget, EXACT, made - 1
