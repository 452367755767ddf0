"""Which requests run in the next step, with how many tokens (design 4.5).

Token k of a stage is due at its start + k * TPOT. Decodes that would be late if they waited for the next batch are in;
the batch may last until the earliest due time; prefill chunks fill it in deadline order; then decodes that could wait;
then best effort. With nothing to prefill every decode runs. Room is counted in seconds by the batch-time model and in
KV blocks; an SLO request short of blocks takes them from best effort.

The plan is one that an engine can follow by order and budget alone: everyone gets all of what is left to do except at
most one chunk, and that chunk comes last in the engine's order (running before waiting).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.plan import Reason
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.batch_time import K_CTX, K_S, K_SEQ
from slos_serve.planning.batch import (
    DRAFT_STEPS,
    FIXED_S,
    NUM_ENTRIES,
    NUM_HELD,
    NUM_PREEMPTED,
    NUM_RUNNING,
    TOKENS,
    Batch,
    Limits,
    batch_s,
    blocks_short,
    empty_batch,
    hold,
    is_preempted,
    largest_chunk,
    make_room,
    put,
    put_decode,
    tokens_done,
    tokens_left,
)
from slos_serve.planning.holding import ahead_enough, decode_s, spare_time_s
from slos_serve.planning.prefill_rate import FloatArray, IntArray, linear_step_s
from slos_serve.planning.step_length import step_limits_s
from slos_serve.planning.work import Drafts, Work, anyone_prefills, cap_drafts, draft_of, drafts_of, sort_out

DECODE_DUE = int(Reason.DECODE_DUE)
PREFILL_DEADLINE = int(Reason.PREFILL_DEADLINE)
DECODE_EARLY = int(Reason.DECODE_EARLY)
BEST_EFFORT_ROOM = int(Reason.BEST_EFFORT)
HELD_AHEAD = int(Reason.HELD_AHEAD)
NO_ROOM = int(Reason.NO_ROOM)
NO_MEMORY = int(Reason.NO_MEMORY)
_EPSILON_S = 1e-9
# When the due decodes alone overfill a step, those that can wait for this part of the next one do.
CROWDED_SHARE = 0.75
# A turn of whoever is kept (see ``aging``) computes no less of its prompt, however full the step.
TURN_TOKENS = 64
# Positions in the flags that the passes hand on.
STOPPED, WAITING_STARTED = range(2)


@njit(cache=True)
def _youngest_first(rows: RequestArray, slots: SlotArray, kept: int) -> SlotArray:
    """Best effort gives way youngest first: the oldest keeps what it has done, and ``kept`` does not give way."""
    ordered = slots[np.argsort(-rows["order"][slots], kind="mergesort")]
    giving: SlotArray = ordered[ordered != kept]
    return giving


@njit(cache=True)
def _with_one_s(rows: RequestArray, slot: int, draft: int, coefficients: FloatArray, sums: FloatArray) -> float:
    """Seconds of the batch with one more decode that verifies ``draft`` drafts."""
    after_s = linear_step_s(coefficients, sums[TOKENS] + 1.0 + draft) + sums[FIXED_S]
    after_s += coefficients[K_SEQ] * (1.0 + draft) + coefficients[K_S] * max(draft - sums[DRAFT_STEPS], 0.0)
    return float(after_s + coefficients[K_CTX] * rows["computed_tokens"][slot])


@njit(cache=True)
def _add_due_decodes(
    rows: RequestArray,
    work: Work,
    drafts: Drafts,
    hold_until_s: float,
    crowded_until_s: float,
    pace_s: float,
    may_hold: bool,
    limit_s: float,
    spare_s: float,
    limits: Limits,
    batch: Batch,
) -> tuple[SlotArray, IntArray]:
    """Add the decodes due by ``hold_until_s``, all of them unless they may be held; returns those that can wait,
    and what they would draft. Of those that may be held ``spare_s`` seconds run as well, within ``limit_s``.

    When they take longer than ``pace_s``, those due after ``crowded_until_s`` wait as well: loose tiers that fell into
    the same step would else make it late for the tight ones, and the next one half empty.
    """
    coefficients, max_tokens, _, block_size, max_num_seqs = limits
    sums, counts, entries, held, victims = batch
    decodes, due_s, lengths = work.decodes, work.decode_due_s, drafts.lengths
    early, early_drafts = np.empty(len(decodes), dtype=np.int64), np.empty(len(decodes), dtype=np.int64)
    num_early = 0
    for j in range(len(decodes)):
        slot, draft = decodes[j], lengths[j]
        could_wait = may_hold and due_s[j] > hold_until_s
        if could_wait and spare_s > 0.0 and _with_one_s(rows, slot, draft, coefficients, sums) <= limit_s:
            spare_s -= decode_s(rows, slot, draft, coefficients)
            could_wait = spare_s < 0.0
        if could_wait or (due_s[j] > crowded_until_s and _with_one_s(rows, slot, draft, coefficients, sums) > pace_s):
            early[num_early], early_drafts[num_early] = slot, draft
            num_early += 1
        elif sums[TOKENS] + 1 > max_tokens:
            hold(slot, NO_ROOM, counts, held)
        elif not make_room(rows, slot, 1, block_size, max_num_seqs, sums, counts, victims):
            hold(slot, NO_MEMORY, counts, held)
        else:
            if sums[TOKENS] + 1 + draft > max_tokens or blocks_short(rows, slot, 1 + draft, block_size, sums):
                draft = 0
            put_decode(rows, slot, draft, DECODE_DUE, coefficients, block_size, sums, counts, entries)
    return early[:num_early], early_drafts[:num_early]


@njit(cache=True)
def _chunk(
    rows: RequestArray, slot: int, limit_s: float, budget: int, limits: Limits, sums: FloatArray, flags: IntArray
) -> int:
    """Tokens of a request that still fit into the step: all that is left to do, or one chunk that ends the batch."""
    if flags[STOPPED] == 1:
        return 0
    todo = tokens_left(rows, slot)
    fits = largest_chunk(limits.coefficients, sums, limit_s, tokens_done(rows, slot))
    chunk = min(todo, fits, int(budget - sums[TOKENS]))
    after_waiting = rows["running"][slot] == 1 and flags[WAITING_STARTED] == 1
    if chunk < todo and (chunk < limits.min_chunk or after_waiting):
        return 0
    return int(chunk)


@njit(cache=True)
def _put_chunk(
    rows: RequestArray, slot: int, chunk: int, reason: int, limits: Limits, batch: Batch, flags: IntArray
) -> bool:
    """Add what :func:`_chunk` found; whether the request has all of what it had left to do."""
    whole = chunk >= tokens_left(rows, slot)
    put(rows, slot, chunk, reason, limits.coefficients, limits.block_size, batch.sums, batch.counts, batch.entries)
    if rows["running"][slot] == 0:
        flags[WAITING_STARTED] = 1
    if not whole:
        flags[STOPPED] = 1
    return whole


@njit(cache=True)
def _add_prefills(
    rows: RequestArray,
    work: Work,
    now_s: float,
    limit_s: float,
    budget: int,
    fixed: bool,
    limits: Limits,
    batch: Batch,
    flags: IntArray,
) -> float:
    """Add prefill chunks in deadline order; one that ends its prompt brings the step's end forward to its due time."""
    coefficients, _, _, block_size, max_num_seqs = limits
    sums, counts, _, held, victims = batch
    for j in range(len(work.prefills)):
        slot = work.prefills[j]
        is_running = rows["running"][slot] == 1
        chunk = 0
        if is_running or sums[NUM_RUNNING] < max_num_seqs or counts[NUM_PREEMPTED] < len(victims):
            chunk = _chunk(rows, slot, limit_s, budget, limits, sums, flags)
        reason = NO_ROOM
        # An engine starts a request only when its whole prompt fits.
        needed = chunk if is_running else tokens_left(rows, slot)
        if chunk > 0 and not make_room(rows, slot, needed, block_size, max_num_seqs, sums, counts, victims):
            chunk, reason = 0, NO_MEMORY
        if chunk <= 0:
            if is_running:
                hold(slot, reason, counts, held)
            continue
        whole = _put_chunk(rows, slot, chunk, PREFILL_DEADLINE, limits, batch, flags)
        if whole and not fixed:
            limit_s = min(limit_s, max(work.prefill_due_s[j] - now_s, batch_s(coefficients, sums)))
    return limit_s


@njit(cache=True)
def _give_turn(
    rows: RequestArray, slot: int, limit_s: float, budget: int, limits: Limits, batch: Batch, flags: IntArray
) -> None:
    """Compute some of whoever has the turn, ahead of every prompt: what fits, and no less than a small chunk."""
    block_size, max_num_seqs = limits.block_size, limits.max_num_seqs
    sums, counts, _, held, victims = batch
    todo = tokens_left(rows, slot)
    chunk = max(_chunk(rows, slot, limit_s, budget, limits, sums, flags), min(todo, TURN_TOKENS))
    chunk = int(min(chunk, limits.max_tokens - sums[TOKENS]))
    is_running = rows["running"][slot] == 1
    needed = chunk if is_running else todo
    if chunk > 0 and make_room(rows, slot, needed, block_size, max_num_seqs, sums, counts, victims):
        _put_chunk(rows, slot, chunk, BEST_EFFORT_ROOM, limits, batch, flags)
    elif is_running:
        hold(slot, NO_ROOM, counts, held)


@njit(cache=True)
def _add_early_decodes(
    rows: RequestArray,
    early: SlotArray,
    drafts: IntArray,
    limit_s: float,
    budget: int,
    limits: Limits,
    batch: Batch,
    flags: IntArray,
) -> None:
    """Add decodes that could wait, while they fit."""
    coefficients, block_size = limits.coefficients, limits.block_size
    sums, counts, entries, held, _ = batch
    for j in range(len(early)):
        slot, draft = early[j], drafts[j]
        if counts[NUM_ENTRIES] == 0 or blocks_short(rows, slot, 1 + draft, block_size, sums):
            draft = 0
        fits = sums[TOKENS] + 1 + draft <= budget and flags[STOPPED] == 0
        if fits:
            after_s = _with_one_s(rows, slot, draft, coefficients, sums)
            fits = after_s <= limit_s + _EPSILON_S or counts[NUM_ENTRIES] == 0
        if not fits or blocks_short(rows, slot, 1, block_size, sums):
            hold(slot, HELD_AHEAD, counts, held)
        else:
            put_decode(rows, slot, draft, DECODE_EARLY, coefficients, block_size, sums, counts, entries)


@njit(cache=True)
def _add_leftover(
    rows: RequestArray,
    extras: SlotArray,
    leftover: SlotArray,
    turn: int,
    prompts: bool,
    limit_s: float,
    budget: int,
    tier_tpot_s: FloatArray,
    tier_drafts: IntArray,
    limits: Limits,
    batch: Batch,
    flags: IntArray,
) -> None:
    """Fill what is left over: running decodes, then (``prompts``) running prefills and new ones in the order given."""
    coefficients, block_size, max_num_seqs = limits.coefficients, limits.block_size, limits.max_num_seqs
    sums, counts, entries, held, victims = batch
    for wants_decodes in (True, False):
        for slot in extras:
            is_decode = rows["output_tokens"][slot] > 0 and tokens_left(rows, slot) <= 1
            if is_decode != wants_decodes or is_preempted(slot, counts, victims):
                continue
            chunk = _chunk(rows, slot, limit_s, budget, limits, sums, flags)
            draft = draft_of(rows, slot, tier_tpot_s, tier_drafts) if wants_decodes else 0
            if not (is_decode or prompts) or chunk <= 0 or blocks_short(rows, slot, chunk, block_size, sums):
                hold(slot, NO_ROOM, counts, held)
            elif (
                draft > 0
                and sums[TOKENS] + 1 + draft <= budget
                and _with_one_s(rows, slot, draft, coefficients, sums) <= limit_s
                and not blocks_short(rows, slot, 1 + draft, block_size, sums)
            ):
                put_decode(rows, slot, draft, BEST_EFFORT_ROOM, coefficients, block_size, sums, counts, entries)
            else:
                _put_chunk(rows, slot, chunk, BEST_EFFORT_ROOM, limits, batch, flags)
    for slot in leftover:
        if slot == turn:
            continue
        if not prompts or flags[STOPPED] == 1 or sums[NUM_RUNNING] >= max_num_seqs:
            return
        chunk = _chunk(rows, slot, limit_s, budget, limits, sums, flags)
        # A new one starts only when its whole prompt fits: half a prompt only holds memory.
        if chunk <= 0 or blocks_short(rows, slot, tokens_left(rows, slot), block_size, sums):
            return  # first come, first served among best effort
        _put_chunk(rows, slot, chunk, BEST_EFFORT_ROOM, limits, batch, flags)


@njit(cache=True)
def _in_engine_order(
    rows: RequestArray, limits: Limits, batch: Batch
) -> tuple[SlotArray, IntArray, IntArray, IntArray, SlotArray, IntArray, SlotArray, float]:
    """What :func:`form_batch` returns; the engine walks running requests before waiting ones."""
    sums, counts, entries, held, victims = batch
    count, num_held = counts[NUM_ENTRIES], counts[NUM_HELD]
    order = np.argsort(1 - rows["running"][entries[0, :count]], kind="mergesort")
    return (
        entries[0, :count][order],
        entries[1, :count][order],
        entries[2, :count][order],
        entries[3, :count][order],
        held[0, :num_held],
        held[1, :num_held],
        victims[: counts[NUM_PREEMPTED]],
        batch_s(limits.coefficients, sums),
    )


@njit(cache=True)
def form_batch(
    rows: RequestArray,
    running: SlotArray,
    chosen: SlotArray,
    leftover: SlotArray,
    now_s: float,
    coefficients: FloatArray,
    tpot_margin: float,
    max_tokens: int,
    min_chunk: int,
    free_blocks: int,
    total_blocks: int,
    block_size: int,
    max_num_seqs: int,
    hold_decodes: bool,
    fixed_budget: int,
    tier_tpot_s: FloatArray,
    tier_drafts: IntArray,
    alone_drafts: IntArray,
    tier_longer: FloatArray,
    tier_yields: FloatArray,
    longest_s: float,
    lead_tokens: float,
    kept: int,
    turn: int,
) -> tuple[SlotArray, IntArray, IntArray, IntArray, SlotArray, IntArray, SlotArray, float]:
    """Form one step.

    Args:
        rows: the request table.
        running: slots that hold KV, in the engine's order.
        chosen: waiting slots that admission serves, in deadline order.
        leftover: waiting slots that may use what is left over, in the order they are to start.
        now_s: when the step starts.
        coefficients: float64 [8], margins already applied.
        tpot_margin: share of each TPOT kept in hand.
        max_tokens, free_blocks, total_blocks, block_size, max_num_seqs: the engine's limits.
        min_chunk: least prefill chunk in tokens, unless it ends its prompt.
        hold_decodes: decodes that can wait may be held when there is prefill to do.
        fixed_budget: token budget in place of the dynamic one; 0 for dynamic.
        tier_tpot_s, tier_drafts, alone_drafts, tier_longer, tier_yields: fields of
            :class:`slos_serve.planning.drafting.DraftPlan`; empty without speculation.
        longest_s: longest a step may take because of the prompts in it.
        lead_tokens: prompts without a promise wait until promised decodes are that far ahead on average.
        kept: slot that is preempted for nobody; -1 for none.
        turn: slot that computes something in this step before any prompt; -1 for none.

    Returns:
        slots, tokens, reasons, draft lengths (running ones first), held, held_reasons, preempt, predicted seconds.
    """
    limits = Limits(coefficients, max_tokens, min_chunk, block_size, max_num_seqs)
    work = sort_out(rows, running, chosen, tpot_margin, turn)
    most = len(running) + len(chosen) + len(leftover)
    batch = empty_batch(most, len(running), free_blocks, _youngest_first(rows, work.extras, kept))
    flags = np.zeros(2, dtype=np.int64)
    lengths = tier_drafts
    if len(work.prefills) + len(leftover) == 0 and not anyone_prefills(rows, work.extras):
        lengths = alone_drafts
    drafts = drafts_of(rows, work, tpot_margin, tier_tpot_s, lengths, tier_longer, tier_yields)
    limit_s, next_s = step_limits_s(rows, work, drafts, now_s, limits, tpot_margin, longest_s)
    may_hold = hold_decodes and len(work.prefills) > 0
    until_s = now_s + max(limit_s, 0.0) + next_s
    crowded_s = now_s + max(limit_s, 0.0) + CROWDED_SHARE * work.shortest_s if hold_decodes else np.inf
    pace_s = max(limit_s, work.shortest_s)
    spare_s = 0.0
    if may_hold:
        spare_s = spare_time_s(rows, work, drafts, now_s, 1.0 - free_blocks / total_blocks, limits, longest_s)
    if len(lengths) > 0:
        # What the verifications bring on average lasts as long as a step beside them may.
        most_s = max(pace_s, drafts.longest_s)
        cap_drafts(rows, work, drafts, until_s if may_hold else np.inf, most_s, limits)
    early, early_drafts = _add_due_decodes(
        rows, work, drafts, until_s, crowded_s, pace_s, may_hold, limit_s, spare_s, limits, batch
    )
    limit_s = max(limit_s, batch_s(coefficients, batch.sums))
    budget = max_tokens
    if fixed_budget > 0:
        limit_s, budget = np.inf, min(max_tokens, fixed_budget)
    if turn >= 0:
        _give_turn(rows, turn, limit_s, budget, limits, batch, flags)
    limit_s = _add_prefills(rows, work, now_s, limit_s, budget, fixed_budget > 0, limits, batch, flags)
    _add_early_decodes(rows, early, early_drafts, limit_s, budget, limits, batch, flags)
    prompts = ahead_enough(rows, work, now_s, lead_tokens)
    _add_leftover(
        rows, work.extras, leftover, turn, prompts, limit_s, budget, tier_tpot_s, lengths, limits, batch, flags
    )
    return _in_engine_order(rows, limits, batch)
