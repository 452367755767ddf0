"""A replica's admission, asked in its place, on the mirrors' arrays.

A mirror is a demand and a supply. Whether a request and all that is promised keep their deadlines is
:func:`slos_serve.planning.feasible.first_missed`, and what the request asks for is the planner's :func:`build_demand`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.core.request import RequestArray
from slos_serve.perf.jit import in_place
from slos_serve.perf.lengths import forecast_lengths
from slos_serve.perf.step_time import decode_s, roofline_s
from slos_serve.planning.admission import CUT_SHORT, CUT_SHORT_WITH_DRAFTS
from slos_serve.planning.deadlines import pace_answer
from slos_serve.planning.demand import SIZES, Demand, build_demand, is_lost
from slos_serve.planning.feasible import TOLERANCE, first_missed, first_unseated
from slos_serve.planning.state import ADMITTED, UNDECIDED, FloatArray, IntArray, State, peak_blocks, weight_of
from slos_serve.planning.supply import Supply
from slos_serve.routing.mirror_arrays import MirrorArrays, advance, load_of, supply_of

BoolArray = NDArray[np.bool_]

PACK, SPREAD = 0, 1
# Answers of a mirror: not attainable; attainable in the place of one that has not begun; beside all that is promised.
NO, INSTEAD, BESIDE = 0, 1, 2
NOBODY = -1
# To come, for a promise that is made already.
NOTHING = np.zeros((2, SIZES))


@in_place
def _tier_for(m: MirrorArrays, k: int, pace_s: float) -> int:
    """The tier of a TPOT, made when there is none and there is room; else the loosest one that is tight enough."""
    found = -1
    tightest = 0
    for j in range(m.num_tiers[k]):
        if m.pace_s[k, j] == pace_s:
            return j
        if m.pace_s[k, j] <= pace_s and (found < 0 or m.pace_s[k, j] > m.pace_s[k, found]):
            found = j
        if m.pace_s[k, j] < m.pace_s[k, tightest]:
            tightest = j
    j = int(m.num_tiers[k])
    if j < m.pace_s.shape[1]:
        m.num_tiers[k] = j + 1
        m.pace_s[k, j] = pace_s
        m.periods_s[k, j] = pace_s * (1.0 - m.margin[k])
        m.tokens_each[k, j] = 1.0
        m.extra_s_each[k, j] = 0.0
        m.counts[k, j] = 0.0
        m.in_tier[k, j] = 0.0
        return j
    if found >= 0:
        return found
    m.pace_s[k, tightest] = pace_s
    m.periods_s[k, tightest] = min(m.periods_s[k, tightest], pace_s * (1.0 - m.margin[k]))
    return tightest


@njit(cache=True)
def state_of_one(m: MirrorArrays, k: int, row: RequestArray, cached_tokens: int) -> State:
    """Replica ``k`` with nothing in it but the request in ``row[0]``, which waits."""
    one, none = np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int64)
    row["cached_tokens"][0] = cached_tokens
    # A replica may know fewer classes than the router; the last is for requests of none.
    last = m.forecast_tokens.shape[1] - 1
    if row["class_index"][0] > last:
        row["class_index"][0] = last
        row["share"][0] = last
    forecast_lengths(row, one, m.forecast_tokens[k])
    blocks, size, many = m.total_blocks[k], m.block_size[k], 1 << 40
    status = np.full(1, UNDECIDED)
    state = State(
        row,
        status,
        none,
        one,
        m.coefficients[k],
        m.clock_s[k],
        m.margin[k],
        m.boost[k],
        blocks,
        blocks,
        size,
        many,
        many,
        0,
        1,
        0,
        False,
    )
    if row["answer_due_s"][0] < np.inf:
        pace_answer(state, 0)
    return state


@njit(cache=True)
def demand(m: MirrorArrays, k: int, state: State, to_come: FloatArray) -> tuple[float, float, int, float, FloatArray]:
    """What the request of a state asks of replica ``k``: due time, cost, tier, extra seconds, memory [K].

    Args:
        to_come: float64 [2, SIZES], what an open request is charged for: the mirror's, or ``NOTHING``.
    """
    row = state.rows
    tier = _tier_for(m, k, row["tpot_s"][0])
    found = build_demand(state, state.waiting, m.pace_s[k], m.max_implied_ttft_s[k], 0.0, to_come)
    context = row["prompt_tokens"][0] + 0.5 * (row["output_tokens"][0] + row["expected_tokens"][0])
    memory = np.full(m.memory_left.shape[1], float(peak_blocks(row, 0, m.block_size[k])))
    return found.due_s[0], found.tokens[0], tier, decode_s(m.coefficients[k], 0.0, context), memory


@njit(cache=True)
def _place(m: MirrorArrays, k: int, due_s: float) -> int:
    """How many owed prompts stand before one that is due at ``due_s``; it comes after its equals."""
    first = m.first[k]
    return int(np.searchsorted(m.due_s[k, first : first + m.num_owed[k]], due_s, side="right"))


@njit(cache=True)
def _with(m: MirrorArrays, k: int, at: int, due_s: float, cost: float, tier: int) -> Demand:
    """What replica ``k`` owes, and one more at position ``at``; memory is looked at apart."""
    first, n = m.first[k], m.num_owed[k] + 1
    dues, costs, needs, tiers = np.empty(n), np.empty(n), np.empty(n), np.empty(n, dtype=np.int64)
    for i in range(n):
        place = first + i - (1 if i > at else 0)
        dues[i] = due_s if i == at else m.due_s[k, place]
        costs[i] = cost if i == at else m.cost_tokens[k, place]
        tiers[i] = tier if i == at else m.tier[k, place]
        needs[i] = 1.0 if i == at else m.needs_seat[k, place]
    return Demand(tiers, dues, costs, tiers, np.empty((n, 0)), np.ones(n), np.zeros(n, dtype=np.bool_), needs)


@in_place
def _short_of_memory(m: MirrorArrays, k: int, memory: FloatArray, given_up: int) -> int:
    """The first checkpoint at which ``memory`` does not fit when ``given_up`` (a position, or -1) goes; -1 for none."""
    for j in range(len(memory)):
        freed = m.memory[k, m.first[k] + given_up, j] if given_up >= 0 else 0.0
        if memory[j] > m.memory_left[k, j] + freed + TOLERANCE:
            return j
    return -1


@in_place
def _costliest(m: MirrorArrays, k: int, size: FloatArray, own: int, own_weight: float, before: int) -> int:
    """Which of the first ``before`` is the largest for its weight among those that have not begun.

    Args:
        m, k: the mirror.
        size: float64 [num_owed + 1], of each owed prompt and of the one that asks, which stands at ``own``.
        own: its position.
        own_weight: its weight.
        before: how many to look at.

    Returns:
        A position, ``own`` when it is the largest itself, -1 when nobody can give way.
    """
    found, largest = -1, -1.0
    for i in range(before):
        weight = own_weight
        if i != own:
            place = m.first[k] + i - (1 if i > own else 0)
            if m.begun[k, place] == 1:
                continue
            weight = m.weight[k, place]
        if size[i] / weight > largest:
            found, largest = i, size[i] / weight
    return found


@njit(cache=True)
def _missed(m: MirrorArrays, k: int, taken: BoolArray, asked: Demand, extras: FloatArray) -> tuple[int, float]:
    """The first of a set that is late or finds no seat on replica ``k``, whose decodes add ``extras`` seconds each; -1
    for none. And the budget left, see :func:`first_missed`."""
    drafting = m.tokens_each[k, : m.num_tiers[k]].max() > 1.0 + TOLERANCE
    fixed_s = roofline_s(m.coefficients[k], 0.0)
    s = supply_of(m, k, fixed_s * (CUT_SHORT_WITH_DRAFTS if drafting else CUT_SHORT))
    supply = Supply(
        s.coefficients, s.max_tokens, s.draft_s, s.start_s, s.counts, s.periods_s, s.tokens_each, extras, s.blocks,
        s.moments_s, s.lent_tokens, s.seats,
    )  # fmt: skip
    late, left = first_missed(taken, asked, supply)
    unseated = first_unseated(taken, asked, supply)
    return (unseated if unseated >= 0 and (late < 0 or unseated < late) else late), left


@njit(cache=True)
def has_seat(m: MirrorArrays, k: int, due_s: float, cost: float) -> bool:
    """Whether a prompt of ``cost`` tokens that is due at ``due_s`` finds a seat in time, and all that are owed too."""
    asked = _with(m, k, _place(m, k, due_s), due_s, cost, 0)
    everybody = np.ones(len(asked.due_s), dtype=np.bool_)
    return first_unseated(everybody, asked, supply_of(m, k, 0.0)) < 0


@njit(cache=True)
def ask(m: MirrorArrays, k: int, row: RequestArray, cached_tokens: int) -> tuple[int, int]:
    """Whether replica ``k`` would admit the request, as its own admission would judge.

    Where it does not fit beside all that is promised, admission gives up the costliest of those that have not begun and
    stand before the violation. That may be another than the one that asks, if what is left then is worth more: by
    weight, then by remaining budget.

    Returns:
        ``NO``, ``INSTEAD`` or ``BESIDE``, and the place of the one given up, -1 when none is.
    """
    state = state_of_one(m, k, row, cached_tokens)
    if is_lost(state, 0):
        return NO, -1
    due_s, cost, tier, extra_s, memory = demand(m, k, state, m.to_come[k])
    weight = weight_of(state, 0)
    at = _place(m, k, due_s)
    asked = _with(m, k, at, due_s, cost, tier)
    extras = m.extra_s_each[k].copy()
    extras[tier] += (extra_s - extras[tier]) / (m.in_tier[k, tier] + 1.0)
    taken = np.ones(len(asked.due_s), dtype=np.bool_)
    short = _short_of_memory(m, k, memory, -1)
    if short >= 0:
        blocks = np.empty(len(asked.due_s))
        first, last = m.first[k], m.first[k] + m.num_owed[k]
        blocks[:at], blocks[at] = m.memory[k, first : first + at, short], memory[short]
        blocks[at + 1 :] = m.memory[k, first + at : last, short]
        victim = _costliest(m, k, blocks, at, weight, len(blocks))
    else:
        violated, _ = _missed(m, k, taken, asked, extras)
        if violated < 0:
            return BESIDE, -1
        victim = _costliest(m, k, asked.tokens, at, weight, violated + 1)
    if victim < 0 or victim == at:
        return NO, -1
    place = m.first[k] + victim - (1 if victim > at else 0)
    taken[victim] = False
    violated, left = _missed(m, k, taken, asked, extras)
    if violated >= 0 or _short_of_memory(m, k, memory, place - m.first[k]) >= 0:
        return NO, -1
    taken[victim], taken[at] = True, False
    kept, left_without = _missed(m, k, taken, asked, extras)
    gain = weight - m.weight[k, place]
    if gain > 0.0 or (gain == 0.0 and (kept >= 0 or left > left_without)):
        return INSTEAD, place
    return NO, -1


@in_place
def give_up(m: MirrorArrays, k: int, place: int) -> None:
    """What stands at ``place`` is owed no more and waits without a promise."""
    for j in range(m.memory_left.shape[1]):
        m.memory_left[k, j] += m.memory[k, place, j]
    for i in range(place, m.first[k] + m.num_owed[k] - 1):
        _move(m, k, i + 1, i)
    m.num_owed[k] -= 1
    m.num_unpromised[k] += 1


@in_place
def _move(m: MirrorArrays, k: int, source: int, target: int) -> None:
    """Copy an owed prompt from one place to another."""
    m.due_s[k, target] = m.due_s[k, source]
    m.cost_tokens[k, target] = m.cost_tokens[k, source]
    m.tier[k, target] = m.tier[k, source]
    m.weight[k, target] = m.weight[k, source]
    m.needs_seat[k, target] = m.needs_seat[k, source]
    m.begun[k, target] = m.begun[k, source]
    for j in range(m.memory_left.shape[1]):
        m.memory[k, target, j] = m.memory[k, source, j]


@njit(cache=True)
def enter(m: MirrorArrays, k: int, row: RequestArray, cached_tokens: int) -> None:
    """Count the request among what replica ``k`` has promised, or among the unpromised when it does not fit any more.

    A row that is ``ADMITTED`` was told its promise for good: it counts whether it fits or not, and nobody takes its
    place. There must be a place left (``first + num_owed < N``).
    """
    answer, given_up = ask(m, k, row, cached_tokens)
    told = row["status"][0] == ADMITTED
    if answer == NO and not told:
        m.num_unpromised[k] += 1
        return
    if given_up >= 0:
        give_up(m, k, given_up)
    state = state_of_one(m, k, row, cached_tokens)
    due_s, cost, tier, extra_s, memory = demand(m, k, state, NOTHING if told else m.to_come[k])
    m.extra_s_each[k, tier] += (extra_s - m.extra_s_each[k, tier]) / (m.in_tier[k, tier] + 1.0)
    m.in_tier[k, tier] += 1.0
    at = m.first[k] + _place(m, k, due_s)
    for i in range(m.first[k] + m.num_owed[k], at, -1):
        _move(m, k, i - 1, i)
    m.due_s[k, at], m.cost_tokens[k, at], m.tier[k, at] = due_s, cost, tier
    m.weight[k, at], m.begun[k, at], m.needs_seat[k, at] = weight_of(state, 0), 1 if told else 0, 1.0
    for j in range(len(memory)):
        m.memory_left[k, j] -= memory[j]
        m.memory[k, at, j] = memory[j]
    m.num_owed[k] += 1


@njit(cache=True)
def choose(
    m: MirrorArrays, order: int, now_s: float, row: RequestArray, cached: IntArray, usable: BoolArray, home: int
) -> tuple[int, int]:
    """The first replica, in the order of asking, that attains the request beside all it has promised.

    Without one, the first that attains it in the place of another; ``NOBODY`` when none does either.

    Args:
        m: the mirrors; those that are asked are moved to ``now_s``.
        order: ``PACK`` asks the busiest first, ``SPREAD`` the least busy.
        now_s: present time.
        row: :data:`slos_serve.core.request.REQUEST_DTYPE` [1], the request.
        cached: int64 [R], prompt tokens that each replica has cached.
        usable: bool [R], whose publication is fresh.
        home: replica asked before all others, or ``NOBODY``.

    Returns:
        The replica's position and its answer.
    """
    second = NOBODY
    if home >= 0 and usable[home]:
        advance(m, home, max(now_s, m.ready_s[home]))
        answer, _ = ask(m, home, row, cached[home])
        if answer == BESIDE:
            return home, BESIDE
        if answer == INSTEAD:
            second = home
    loads = np.full(len(usable), np.inf)
    count = 0
    for k in range(len(usable)):
        if usable[k]:
            advance(m, k, max(now_s, m.ready_s[k]))
            loads[k] = load_of(m, k)
            count += 1
    asked = np.argsort(loads, kind="mergesort")[:count]
    for i in range(count):
        k = int(asked[i] if order == SPREAD else asked[count - 1 - i])
        if k == home:
            continue
        answer, _ = ask(m, k, row, cached[k])
        if answer == BESIDE:
            return k, BESIDE
        if answer == INSTEAD and second == NOBODY:
            second = k
    return second, INSTEAD if second != NOBODY else NO


@njit(cache=True)
def least_loaded(m: MirrorArrays, now_s: float, present: BoolArray, usable: BoolArray) -> int:
    """Where a request without a promise waits least: fewest like it, then the least busy; fresh ones first."""
    best = NOBODY
    best_load = np.inf
    for k in range(len(present)):
        if not present[k]:
            continue
        load = np.inf
        if usable[k]:
            advance(m, k, max(now_s, m.ready_s[k]))
            load = load_of(m, k)
        if best == NOBODY:
            better = True
        elif usable[k] != usable[best]:
            better = usable[k]
        elif m.num_unpromised[k] != m.num_unpromised[best]:
            better = m.num_unpromised[k] < m.num_unpromised[best]
        else:
            better = load < best_load
        if better:
            best, best_load = k, load
    return best
