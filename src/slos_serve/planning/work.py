"""What there is to run in a step, and how long the step may last."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import SlotArray
from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import batch_s, decode_s
from slos_serve.planning.drafting import StepDrafts
from slos_serve.planning.state import ADMITTED, FloatArray, State, is_decode, next_due_s, step_pace_s, tokens_left


class Rules(NamedTuple):
    """What the planner decides for one step beside who is served.

    Attributes:
        longest_s: longest step beside its decodes, so that a prompt that arrives meanwhile is still in time.
        sure: share of the time until a first token is due that the step which brings it may be planned to take.
        kept: slot that is preempted for nobody; -1 for none.
        turn: slot that computes something before any prompt; -1 for none.
    """

    longest_s: float
    sure: float
    kept: int
    turn: int


class Work(NamedTuple):
    """What there is to run, each part in the order of its due times.

    Attributes:
        decodes, decode_due_s: promised decodes.
        prefills, prefill_due_s: promised prompts, running ones and those that admission serves.
        others: running requests without a promise, oldest first.
        starting: waiting requests without a promise, in the order they are to start.
        pace_s: shortest time between two tokens of a promised decode, margin taken off.
    """

    decodes: SlotArray
    decode_due_s: FloatArray
    prefills: SlotArray
    prefill_due_s: FloatArray
    others: SlotArray
    starting: SlotArray
    pace_s: float


@njit(cache=True)
def by_due_time(state: State, slots: SlotArray) -> tuple[SlotArray, FloatArray]:
    """``slots`` in the order of their due times, and these times."""
    due_s = np.empty(len(slots))
    for j in range(len(slots)):
        due_s[j] = next_due_s(state.rows, slots[j], state.margin)
    order = np.argsort(due_s, kind="mergesort")
    return slots[order], due_s[order]


@njit(cache=True)
def split_by_promise(state: State, chosen: SlotArray, starting: SlotArray, turn: int) -> Work:
    """Promised decodes, promised prompts and the rest; requests that cannot run now and ``turn`` are in none of them.

    A waiting request for which there is no seat, not even of one that may be preempted, cannot run either.

    Args:
        chosen: waiting slots that admission serves, by deadline.
        starting: waiting slots without a promise, in order.
    """
    rows, most = state.rows, len(state.running) + len(chosen)
    decodes, prefills, others = np.empty((3, most), dtype=np.int64)
    num_decodes, num_prefills, num_others, pace_s = 0, 0, 0, np.inf
    for slot in state.running:
        if slot == turn or rows["blocked"][slot] == 1 or tokens_left(rows, slot) == 0:
            continue
        if state.status[slot] != ADMITTED:
            others[num_others] = slot
            num_others += 1
        elif is_decode(rows, slot):
            decodes[num_decodes] = slot
            pace_s = min(pace_s, step_pace_s(rows, slot) * (1.0 - state.margin))
            num_decodes += 1
        else:
            prefills[num_prefills] = slot
            num_prefills += 1
    free = state.max_num_seqs - len(state.running)
    seats = free + num_others
    for slot in chosen:
        if slot != turn and rows["blocked"][slot] == 0 and seats > 0:
            prefills[num_prefills] = slot
            num_prefills += 1
            seats -= 1
    if free <= 0:
        starting = starting[:0]
    rest = others[:num_others]
    rest = rest[np.argsort(rows["order"][rest], kind="mergesort")]
    return Work(
        *by_due_time(state, decodes[:num_decodes]), *by_due_time(state, prefills[:num_prefills]), rest, starting, pace_s
    )


@in_place
def any_prefill(state: State, work: Work) -> bool:
    """Whether anybody has more to compute than the next token."""
    if len(work.prefills) + len(work.starting) > 0:
        return True
    found = False
    for slot in work.others:
        found = found or not is_decode(state.rows, slot)
    return found


@in_place
def step_length_s(state: State, work: Work, drafts: StepDrafts, rules: Rules) -> tuple[float, float]:
    """How long the step may last, and how long the next one may: until the earliest due time, the longest step at most.

    A step is never shorter than what the decodes take that are due, so the next one may last as long as all decodes.
    """
    own_s, tokens, longest = 0.0, 0.0, 0
    for j in range(len(work.decodes)):
        own_s += decode_s(state.coefficients, drafts.lengths[j], state.rows["computed_tokens"][work.decodes[j]])
        tokens += 1.0 + drafts.lengths[j]
        longest = max(longest, drafts.lengths[j])
    all_decodes_s = batch_s(state.coefficients, tokens, own_s, longest)
    most_s = rules.longest_s + own_s
    limit_s = min(most_s, max(drafts.longest_s, all_decodes_s))
    if len(work.decodes) > 0:
        limit_s = min(limit_s, work.decode_due_s[0] - state.now_s)
    return limit_s, max(min(drafts.ahead_s, most_s), all_decodes_s)
