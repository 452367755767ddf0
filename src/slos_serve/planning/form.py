"""Which requests run in the next step, with how many tokens.

Token k of a stage is due at its start + k * TPOT. In this order: decodes that would be late if they waited for the next
step, or every decode where promised prompts have time; the turn of the oldest best-effort request; promised prompts by
deadline; decodes that could wait; requests without a promise. A promised request short of KV takes it from best effort.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.plan import Reason
from slos_serve.core.request import SlotArray
from slos_serve.perf.jit import in_place
from slos_serve.planning.best_effort import NOBODY, TURN_TOKENS, ahead_enough
from slos_serve.planning.drafting import DraftPlan, StepDrafts, cap_drafts, draft_of, step_drafts
from slos_serve.planning.state import (
    ADMITTED,
    IntArray,
    State,
    held_blocks,
    is_decode,
    peak_blocks,
    tokens_left,
    without,
)
from slos_serve.planning.step import (
    CUT,
    ENTRIES,
    FREE,
    HELD,
    NO_MEMORY,
    NO_ROOM,
    SEATS,
    STARTED,
    TOKENS,
    Step,
    chunk_within,
    empty_step,
    has_room,
    hold,
    make_room,
    run,
    run_chunk,
    run_decode,
    seconds,
    seconds_with,
)
from slos_serve.planning.supply import KV_SHORT_FROM
from slos_serve.planning.work import WAIT_SHARE, Rules, Work, any_prefill, split_by_promise, step_lengths

DECODE_DUE, PREFILL_DEADLINE = int(Reason.DECODE_DUE), int(Reason.PREFILL_DEADLINE)
DECODE_EARLY, BEST_EFFORT_ROOM = int(Reason.DECODE_EARLY), int(Reason.BEST_EFFORT)
HELD_AHEAD = int(Reason.HELD_AHEAD)
# When the due decodes alone overfill a step, those not due within this share of the next one are postponed.
CROWDED_SHARE = 0.75
# Starts without a promise leave KV for so many requests like the promised ones; half of the KV at most.
ROOM_FOR, MOST_LEFT_FREE = 4.0, 0.5
_EPSILON_S = 1e-9


@in_place
def add_due_decodes(step: Step, work: Work, drafts: StepDrafts, hold_s: float, crowd: tuple[float, float]) -> int:
    """Run the decodes that are due by ``hold_s``; returns how many of them there are, the rest can wait.

    Args:
        crowd: when the due decodes take longer than the first of the two seconds, those due after the second wait too.
            Loose tiers in the same step would make it late for the tight ones, and leave the next one half empty.
    """
    pace_s, until_s = crowd
    for j in range(len(work.decodes)):
        slot, draft = work.decodes[j], drafts.lengths[j]
        if work.decode_due_s[j] > hold_s:
            return j
        if work.decode_due_s[j] > until_s and seconds_with(step, slot, draft) > pace_s:
            return j
        run_decode(step, slot, draft, DECODE_DUE)
    return len(work.decodes)


@in_place
def give_turn(step: Step, slot: int, limit_s: float) -> None:
    """Compute some of a request ahead of every prompt: what fits, and no less than a small chunk."""
    state = step.state
    chunk, cut = chunk_within(step, slot, limit_s)
    if chunk < TURN_TOKENS:
        chunk, cut = chunk_within(step, slot, np.inf)
        if cut or chunk > TURN_TOKENS:
            multiple, done = state.chunk_multiple, state.rows["computed_tokens"][slot]
            least = (TURN_TOKENS + multiple - 1) // multiple * multiple
            cut = cut or chunk > least - done % multiple
            chunk = min(chunk, least - done % multiple)
    is_running = state.rows["running"][slot] == 1
    needed = chunk if is_running else tokens_left(state.rows, slot)
    if chunk > 0 and make_room(step, slot, needed):
        run_chunk(step, slot, chunk, cut, BEST_EFFORT_ROOM)
    elif is_running:
        hold(step, slot, NO_ROOM)


@in_place
def can_wait(state: State, slot: int, due_s: float) -> bool:
    """Whether so much of a first token's time is left that KV may come free by itself."""
    return bool(due_s - state.now_s > WAIT_SHARE * (due_s - state.rows["arrival_s"][slot]))


@in_place
def must_leave_room(step: Step, slot: int, due_s: float) -> bool:
    """Whether an answer that is due as a whole waits though it would fit: its start can, and its peak makes KV short.

    Nobody is promised its tokens as they come, so its decodes run when nothing else asks and hold their KV for long.
    """
    state, rows = step.state, step.state.rows
    if rows["running"][slot] == 1 or step.counts[SEATS] == 0:
        return False
    if rows["answer_due_s"][slot] == np.inf or np.isfinite(rows["promised_tpot_s"][slot]):
        return False
    left = step.counts[FREE] - peak_blocks(rows, slot, state.block_size)
    return bool(left < (1.0 - KV_SHORT_FROM) * state.total_blocks and can_wait(state, slot, due_s))


@in_place
def add_prompts(step: Step, work: Work, limit_s: float, sure: float) -> float:
    """Run promised prompts by deadline; one that ends brings the step's end forward, so that it is in time all the same
    when this step is a slow one (``sure``, see :class:`Rules`).

    An engine starts a request only when its whole prompt fits into memory. A running prompt that is to be cut cannot
    stand behind a request that starts: it waits for the next step, which begins the sooner because nothing that is due
    later is put into this one.
    """
    rows, waits = step.state.rows, False
    for j in range(len(work.prefills)):
        slot = work.prefills[j]
        if must_leave_room(step, slot, work.prefill_due_s[j]):
            continue
        is_running = rows["running"][slot] == 1
        chunk, cut = (0, True) if waits else chunk_within(step, slot, limit_s)
        waits = waits or (chunk == 0 and is_running and step.counts[STARTED] == 1 and step.counts[CUT] == 0)
        reason, needed = NO_ROOM, chunk if is_running else tokens_left(rows, slot)
        if (
            chunk > 0
            and not has_room(step, slot, needed)
            and (can_wait(step.state, slot, work.prefill_due_s[j]) or not make_room(step, slot, needed))
        ):
            chunk, reason = 0, NO_MEMORY
        if chunk == 0:
            if is_running:
                hold(step, slot, reason)
            continue
        run_chunk(step, slot, chunk, cut, PREFILL_DEADLINE)
        if chunk == tokens_left(rows, slot):
            limit_s = min(limit_s, max(sure * (work.prefill_due_s[j] - step.state.now_s), seconds(step)))
    return limit_s


@in_place
def add_early_decodes(step: Step, work: Work, drafts: StepDrafts, first: int, limit_s: float) -> None:
    """Run promised decodes from position ``first`` on, which could wait, while they fit; hold the others."""
    for j in range(first, len(work.decodes)):
        slot, draft = work.decodes[j], drafts.lengths[j]
        if step.counts[ENTRIES] == 0 or not has_room(step, slot, 1 + draft):
            draft = 0
        fits = step.counts[CUT] == 0 and step.sums[TOKENS] + 1 + draft <= step.state.max_tokens
        if fits and step.counts[ENTRIES] > 0:
            fits = seconds_with(step, slot, draft) <= limit_s + _EPSILON_S
        if fits and has_room(step, slot, 1):
            run(step, slot, 1 + draft, draft, DECODE_EARLY)
        else:
            hold(step, slot, HELD_AHEAD)


@in_place
def add_others(step: Step, work: Work, plan: DraftPlan, lengths: IntArray, limit_s: float, prompts_s: float) -> None:
    """Fill the rest with running requests without a promise: decodes, then prompts (within ``prompts_s`` seconds; 0:
    none), oldest first."""
    rows = step.state.rows
    for wants_decodes in (True, False):
        for slot in work.others:
            if is_decode(rows, slot) != wants_decodes or step.gone[slot]:
                continue
            chunk, cut = chunk_within(step, slot, limit_s if wants_decodes else prompts_s)
            if chunk == 0 or (prompts_s == 0.0 and not wants_decodes):
                hold(step, slot, NO_ROOM)
                continue
            if not has_room(step, slot, chunk):
                hold(step, slot, NO_MEMORY)
                continue
            draft = draft_of(rows, slot, plan.tpot_s, lengths) if wants_decodes else 0
            fits = step.sums[TOKENS] + 1 + draft <= step.state.max_tokens and has_room(step, slot, 1 + draft)
            if draft > 0 and fits and seconds_with(step, slot, draft) <= limit_s:
                run(step, slot, 1 + draft, draft, BEST_EFFORT_ROOM)
            else:
                run_chunk(step, slot, chunk, cut, BEST_EFFORT_ROOM)


@in_place
def start_others(step: Step, starting: SlotArray, turn: int, limit_s: float) -> None:
    """Start waiting requests without a promise while everybody's forecast peak fits into memory.

    They leave room for some requests like the promised ones: promises to come would take it back, and what was computed
    with it be lost. The first that does not fit ends it, so that a long one is not passed for ever.
    """
    state, rows, room = step.state, step.state.rows, step.state.total_blocks
    promised, their_blocks = 0, 0
    for slot in state.running:
        if not step.gone[slot]:
            blocks = max(peak_blocks(rows, slot, state.block_size), held_blocks(rows, slot, state.block_size))
            room -= blocks
            if state.status[slot] == ADMITTED:
                promised += 1
                their_blocks += blocks
    left_free = min(ROOM_FOR * their_blocks / max(promised, 1), MOST_LEFT_FREE * state.total_blocks)
    for slot in starting:
        if slot == turn or rows["blocked"][slot] == 1:
            continue
        if step.counts[CUT] == 1 or step.counts[SEATS] >= state.max_num_seqs:
            return
        chunk, cut = chunk_within(step, slot, limit_s)
        peak = peak_blocks(rows, slot, state.block_size)
        alone = step.counts[SEATS] == 0
        if chunk == 0 or not has_room(step, slot, tokens_left(rows, slot)) or (peak > room - left_free and not alone):
            return
        room -= peak
        run_chunk(step, slot, chunk, cut, BEST_EFFORT_ROOM)


@njit(cache=True)
def form(state: State, chosen: SlotArray, starting: SlotArray, rules: Rules, plan: DraftPlan) -> Step:
    """One step.

    Args:
        chosen: waiting slots that admission serves.
        starting: waiting slots that may use what is left over, in the order they are to start.
        plan: draft lengths of the tiers.
    """
    work = split_by_promise(state, chosen, starting, rules.turn)
    victims = work.others[::-1].copy()  # youngest first: the oldest keeps what it has computed
    step = empty_step(state, len(state.running) + len(chosen) + len(starting) + 1, victims[victims != rules.kept])
    lengths = plan.tokens if any_prefill(state, work) else plan.alone_tokens
    drafts = step_drafts(state, work.decodes, work.pace_s, plan, lengths)
    lengths_s = step_lengths(state, work, drafts, rules)
    limit_s, end_s = lengths_s.limit_s, state.now_s + max(lengths_s.limit_s, 0.0)
    hold_s = np.inf if lengths_s.prompts_wait else end_s + lengths_s.next_s
    pace_s = max(limit_s, work.pace_s)
    if len(lengths) > 0:
        due = np.searchsorted(work.decode_due_s, hold_s, side="right")
        cap_drafts(state, work.decodes[:due], drafts.lengths[:due], max(pace_s, drafts.longest_s))
    first = add_due_decodes(step, work, drafts, hold_s, (pace_s, end_s + CROWDED_SHARE * work.pace_s))
    limit_s = max(limit_s, seconds(step))
    if rules.turn != NOBODY:
        give_turn(step, rules.turn, limit_s)
    limit_s = add_prompts(step, work, limit_s, rules.sure)
    add_early_decodes(step, work, drafts, first, limit_s)
    prompts = ahead_enough(state.rows, work.decodes, work.decode_due_s, state.now_s)
    others_s = min(limit_s, lengths_s.others_s)
    add_others(step, work, plan, lengths, limit_s, others_s if prompts else 0.0)
    if prompts:
        start_others(step, work.starting, rules.turn, others_s)
    return step


@in_place
def cheapest_to_lose(state: State, kept: int) -> int:
    """The running request to preempt where nothing could run: best effort before promises; of the former the youngest,
    of the latter the one that has computed least. -1 where only one is left, which nobody's KV could help."""
    found, found_promised, found_cost, count = -1, False, 0, 0
    for slot in state.running:
        if state.rows["blocked"][slot] == 1:
            continue
        count += 1
        promised = state.status[slot] == ADMITTED or slot == kept
        cost = state.rows["computed_tokens"][slot] if promised else -state.rows["order"][slot] - 1
        if found < 0 or (found_promised, found_cost) > (promised, cost):
            found, found_promised, found_cost = slot, promised, cost
    return int(found) if count > 1 else -1


@njit(cache=True)
def form_step(
    state: State, chosen: SlotArray, starting: SlotArray, rules: Rules, plan: DraftPlan
) -> tuple[Step, SlotArray]:
    """:func:`form`, and the requests preempted because without their KV nothing could run; arguments as there."""
    gone, count = np.empty(len(state.running), dtype=np.int64), 0
    step = form(state, chosen, starting, rules, plan)
    while step.counts[ENTRIES] == 0 and (step.held[1, : step.counts[HELD]] == NO_MEMORY).any():
        victim = cheapest_to_lose(state, rules.kept)
        if victim < 0:
            break
        gone[count] = victim
        count += 1
        state = without(state, victim)
        if victim == rules.kept:
            rules = Rules(rules.longest_s, rules.sure, NOBODY, NOBODY)
        step = form(state, chosen, starting, rules, plan)
    return step, gone[:count]
