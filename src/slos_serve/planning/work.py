"""What there is to run in a step, and how long the step may last."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import SlotArray
from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import alone_s, batch_s, decode_s, roofline_s
from slos_serve.planning.arrivals import LEAST_STEP_FIXED
from slos_serve.planning.drafting import StepDrafts
from slos_serve.planning.state import (
    ADMITTED,
    FloatArray,
    State,
    is_decode,
    next_due_s,
    step_pace_s,
    tokens_done,
    tokens_left,
)
from slos_serve.planning.step import MIN_CHUNK_TOKENS

# Promised prompts stand behind all decodes while they take no more than this share of the time until they are due; one
# waits for KV, rather than take it from best effort, while more than this share of its TTFT is left.
WAIT_SHARE = 0.5
# With steps planned ahead a step with prompts that nobody is promised lasts this share of the longest one: whoever
# arrives waits for two of them.
OTHERS_SHARE = 0.5


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


class Lengths(NamedTuple):
    """How long steps may last, in seconds.

    Attributes:
        limit_s: this one: until the earliest due time, the longest step at most.
        next_s: the next one. A step is never shorter than what the decodes take that are due, so all of them fit.
        others_s: this one where a prompt without a promise is in it.
        prompts_wait: promised prompts are in time although every decode runs in every step until then.
    """

    limit_s: float
    next_s: float
    others_s: float
    prompts_wait: bool


@in_place
def least_step_s(state: State, work: Work) -> float:
    """A step with prompts lasts this long at least: several times the fixed cost that one with the longest context has,
    and so long that half of it holds a chunk. Else that prompt would never run, with nobody else there either."""
    done = 0
    for part in (work.prefills, work.others, work.starting[:1]):
        for slot in part:
            if not is_decode(state.rows, slot):
                done = max(done, tokens_done(state.rows, slot))
    fixed_s = alone_s(state.coefficients, 1.0, float(done))
    return max(
        LEAST_STEP_FIXED * fixed_s, alone_s(state.coefficients, float(MIN_CHUNK_TOKENS), float(done)) / OTHERS_SHARE
    )


@njit(cache=True)
def step_lengths(state: State, work: Work, drafts: StepDrafts, rules: Rules) -> Lengths:
    """The lengths of this step and the next one."""
    own_s, tokens, longest = 0.0, 0.0, 0
    for j in range(len(work.decodes)):
        own_s += decode_s(state.coefficients, drafts.lengths[j], state.rows["computed_tokens"][work.decodes[j]])
        tokens += 1.0 + drafts.lengths[j]
        longest = max(longest, drafts.lengths[j])
    all_decodes_s = batch_s(state.coefficients, tokens, own_s, longest)
    longest_s = max(rules.longest_s, least_step_s(state, work))
    most_s = longest_s + own_s
    limit_s = min(most_s, max(drafts.longest_s, all_decodes_s))
    if len(work.decodes) > 0:
        limit_s = min(limit_s, work.decode_due_s[0] - state.now_s)
    full_s = min(longest_s, roofline_s(state.coefficients, float(state.max_tokens))) + own_s
    return Lengths(
        limit_s,
        max(min(drafts.ahead_s, most_s), all_decodes_s),
        longest_s * (OTHERS_SHARE if state.plan_ahead else 1.0) + own_s,
        prompts_wait(state, work, full_s, full_s - all_decodes_s),
    )


@in_place
def prompts_wait(state: State, work: Work, step_s: float, left_s: float) -> bool:
    """Whether promised prompts take at most ``WAIT_SHARE`` of the time until they are due, when of each step of
    ``step_s`` seconds ``left_s`` are theirs."""
    asked_s, fixed_s = 0.0, roofline_s(state.coefficients, 0.0)
    for j in range(len(work.prefills)):
        left = float(max(tokens_left(state.rows, work.prefills[j]), 1))
        asked_s += alone_s(state.coefficients, left, float(tokens_done(state.rows, work.prefills[j]))) - fixed_s
        until_s = work.prefill_due_s[j] - state.now_s - step_s
        if asked_s * step_s > WAIT_SHARE * until_s * left_s:
            return False
    return True
