"""What requests without a promise get: room that promises do not need, and turns so that the oldest one ends.

Three rules. They start in the order of fair shares: the tokens begun are counted for each class, and each tenant
within it, and whoever has the fewest comes next; who has nobody waiting saves nothing up. Within a share the next is
the one that has waited longest for each token it asks for, so a short request does not wait as long as a long one.
Their prompts run only while promised decodes are ahead of schedule, because that lead is what the next burst of
promised prompts is computed with. And the oldest of them gets a turn when it has made no progress for ``aging_s``: a
step computes some of it first. From then on promises leave it the KV blocks of its peak and it is preempted for
nobody until it ends. A turn computes only once that peak fits beside the promises made before: its tokens are
computed once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import NUM_SHARES, RequestArray, SlotArray
from slos_serve.perf.jit import in_place
from slos_serve.planning.state import (
    ADMITTED,
    BEST_EFFORT,
    UNDECIDED,
    FloatArray,
    State,
    is_decode,
    peak_blocks,
    tokens_left,
)

NOBODY = -1
# A turn computes no less than this of a prompt, however full the step.
TURN_TOKENS = 64
# While it decodes the request with a turn gets them ten times as often: a token is cheap, and ending frees its KV.
DECODE_TURNS = 10.0
# Promised decodes are this share of the time promised so far ahead before prompts without a promise run, and of their
# stall bound at most. The first keeps a short answer, which can never be far ahead, from shutting them out.
LEAD_OF_PACE, LEAD_OF_STALL = 0.4, 0.9


class Turn(NamedTuple):
    """The oldest best-effort request, as of one plan.

    Attributes:
        order: its arrival order, -1 for nobody.
        progress: tokens it had computed and generated when it progressed last.
        since_s: when that was.
        kept: its slot once its time was up: promises leave it its KV, and it is preempted for nobody. -1 before.
        due: this step computes some of it first.
    """

    order: int
    progress: int
    since_s: float
    kept: int
    due: bool


NO_TURN = Turn(-1, -1, -np.inf, NOBODY, False)


@in_place
def oldest_unpromised(state: State, order: int) -> int:
    """The request of that arrival order if it still has no promise, else the oldest without one; -1 for none.

    One that waits for its promise is not among them: a long prompt with a loose TTFT may start late.
    """
    oldest = -1
    for part in (state.running, state.waiting):
        for slot in part:
            may_be_promised = state.status[slot] == UNDECIDED and state.rows["ttft_due_s"][slot] < np.inf
            if state.status[slot] == ADMITTED or may_be_promised or tokens_left(state.rows, slot) <= 0:
                continue
            if state.rows["order"][slot] == order:
                return int(slot)
            if oldest < 0 or state.rows["order"][slot] < state.rows["order"][oldest]:
                oldest = slot
    return int(oldest)


@in_place
def next_turn(state: State, last: Turn, every_s: float) -> Turn:
    """Who is oldest now and whether its turn is due. A request that is kept stays the one until it ends."""
    slot = oldest_unpromised(state, last.order if last.kept != NOBODY else -1) if every_s > 0.0 else -1
    if slot < 0:
        return Turn(-1, -1, -np.inf, NOBODY, False)
    rows = state.rows
    order, progress = int(rows["order"][slot]), int(rows["computed_tokens"][slot] + rows["output_tokens"][slot])
    if order != last.order:
        return Turn(order, progress, state.now_s, NOBODY, False)
    since_s = state.now_s if progress > last.progress else last.since_s
    kept = slot if last.kept != NOBODY else NOBODY
    wait_s = every_s / DECODE_TURNS if kept != NOBODY and is_decode(rows, slot) else every_s
    waited = state.now_s - since_s >= wait_s
    due = bool(waited and rows["blocked"][slot] == 0 and can_be_kept(state, slot))
    return Turn(order, max(progress, last.progress), since_s, slot if waited else kept, due)


@in_place
def can_be_kept(state: State, slot: int) -> bool:
    """Whether a request's peak fits beside the peaks of all promised ones that hold KV, so that it need never leave."""
    room = state.total_blocks - peak_blocks(state.rows, slot, state.block_size)
    for other in state.running:
        if state.status[other] == ADMITTED:
            room -= peak_blocks(state.rows, other, state.block_size)
    return bool(room >= 0)


@in_place
def ahead_enough(rows: RequestArray, decodes: SlotArray, due_s: FloatArray, now_s: float) -> bool:
    """Whether promised decodes are on average ahead of schedule by what they should have gained.

    Args:
        decodes, due_s: promised decodes and when their next tokens are due.
    """
    ahead_s, wanted_s = 0.0, 0.0
    for j in range(len(decodes)):
        tpot_s, stall_s = rows["tpot_s"][decodes[j]], rows["max_stall_s"][decodes[j]]
        if np.isfinite(tpot_s) and np.isfinite(stall_s):
            ahead_s += due_s[j] - now_s
            wanted_s += min(LEAD_OF_PACE * tpot_s * rows["stage_tokens"][decodes[j]], LEAD_OF_STALL * stall_s)
    return ahead_s >= wanted_s


@njit(cache=True)
def shares_now(state: State, begun: FloatArray) -> FloatArray:
    """float64 [NUM_SHARES]: ``begun`` with those who have nobody waiting raised to the least of those who have.

    Args:
        begun: float64 [NUM_SHARES], tokens begun for each share, as of the last plan.
    """
    now, waits, least = begun.copy(), np.zeros(NUM_SHARES, dtype=np.bool_), np.inf
    for slot in state.waiting:
        if state.status[slot] == BEST_EFFORT:
            share = state.rows["share"][slot]
            waits[share], least = True, min(least, begun[share])
    if least < np.inf:
        for share in range(NUM_SHARES):
            if not waits[share]:
                now[share] = max(now[share], least)
    return now


@in_place
def tokens_to_begin(rows: RequestArray, slot: int) -> float:
    """What starting a request is counted with: the tokens to compute of it, and those of its forecast answer."""
    answer = max(rows["expected_tokens"][slot] - rows["output_tokens"][slot], 0)
    return float(tokens_left(rows, slot) + answer)


@njit(cache=True)
def in_fair_order(state: State, slots: SlotArray, shares: FloatArray, most: int) -> SlotArray:
    """The first ``most`` waiting slots in the order of their shares' counts; within a share whoever has waited longest
    for each of the tokens that it asks for.

    Args:
        shares: float64 [NUM_SHARES], see :func:`shares_now`.
        most: no more of them can start.
    """
    if most <= 0 or len(slots) == 0:
        return slots[:0]
    waited = np.empty(len(slots))
    for j in range(len(slots)):
        waited[j] = (state.now_s - state.rows["arrival_s"][slots[j]]) / tokens_to_begin(state.rows, slots[j])
    slots = slots[np.argsort(-waited, kind="mergesort")]
    counted, at = shares.copy(), np.empty(len(slots))
    for j in range(len(slots)):
        share = state.rows["share"][slots[j]]
        at[j] = counted[share]
        counted[share] += tokens_to_begin(state.rows, slots[j])
    if most < len(slots):
        first = at <= np.partition(at, most - 1)[most - 1]
        slots, at = slots[first], at[first]
    return slots[np.argsort(at, kind="mergesort")][:most]


@in_place
def count_begun(state: State, slots: SlotArray, shares: FloatArray) -> None:
    """Count those of a step's slots that start without a promise, into ``shares``."""
    for slot in slots:
        if state.rows["running"][slot] == 0 and state.status[slot] == BEST_EFFORT:
            shares[state.rows["share"][slot]] += tokens_to_begin(state.rows, slot)
