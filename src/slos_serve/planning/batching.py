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
from slos_serve.perf.batch_time import B_C, B_M, K_C, K_CTX, K_M, K_Q, K_SEQ
from slos_serve.planning.candidates import ADMITTED, next_due_s, tokens_to_do
from slos_serve.planning.prefill_rate import FloatArray, IntArray, linear_step_s

DECODE_DUE = int(Reason.DECODE_DUE)
PREFILL_DEADLINE = int(Reason.PREFILL_DEADLINE)
DECODE_EARLY = int(Reason.DECODE_EARLY)
BEST_EFFORT_ROOM = int(Reason.BEST_EFFORT)
HELD_AHEAD = int(Reason.HELD_AHEAD)
NO_ROOM = int(Reason.NO_ROOM)
NO_MEMORY = int(Reason.NO_MEMORY)
_EPSILON_S = 1e-9
# Part of what a decode's forecast tokens can make up that one wait for a whole prompt may use.
CATCH_UP_SHARE = 0.25

# Positions in the accumulator of the batch being formed.
TOKENS, FIXED_S, FREE_BLOCKS, NUM_RUNNING = range(4)


@njit(cache=True)
def blocks_for(tokens: int, block_size: int) -> int:
    """KV blocks that hold ``tokens``."""
    return (tokens + block_size - 1) // block_size


@njit(cache=True)
def largest_chunk(coefficients: FloatArray, batch: FloatArray, limit_s: float, done: int) -> int:
    """Most prefill tokens, after ``done`` computed ones, that keep the batch within ``limit_s``."""
    fixed_s = batch[FIXED_S] + coefficients[K_SEQ] + coefficients[K_CTX] * done
    square = coefficients[K_Q]
    largest = 1e12
    for branch in range(2):
        slope = coefficients[K_C] if branch == 0 else coefficients[K_M]
        constant = coefficients[B_C] if branch == 0 else coefficients[B_M]
        room_s = limit_s - fixed_s - constant - slope * batch[TOKENS]
        if room_s <= 0.0:
            return 0
        linear = slope + 2.0 * square * done
        if square > 0.0:
            root = 2.0 * room_s / (np.sqrt(linear * linear + 4.0 * square * room_s) + linear)
        elif linear > 0.0:
            root = room_s / linear
        else:
            root = largest
        largest = min(largest, root)
    return int(largest + 1e-9)


@njit(cache=True)
def batch_s(coefficients: FloatArray, batch: FloatArray) -> float:
    """Predicted seconds of the batch so far."""
    if batch[TOKENS] <= 0.0:
        return 0.0
    return float(linear_step_s(coefficients, batch[TOKENS]) + batch[FIXED_S])


@njit(cache=True)
def _put(
    rows: RequestArray, slot: int, tokens: int, coefficients: FloatArray, batch: FloatArray, block_size: int
) -> None:
    """Add a request with ``tokens`` new ones to the batch."""
    done = rows["computed_tokens"][slot]
    if rows["running"][slot] == 0:
        done += rows["cached_tokens"][slot]
        batch[NUM_RUNNING] += 1.0
    batch[TOKENS] += tokens
    batch[FIXED_S] += coefficients[K_SEQ] + coefficients[K_CTX] * done
    if tokens > 1:
        batch[FIXED_S] += coefficients[K_Q] * tokens * (tokens + 2 * done)
    batch[FREE_BLOCKS] -= blocks_for(done + tokens, block_size) - blocks_for(rows["computed_tokens"][slot], block_size)


@njit(cache=True)
def _blocks_short(rows: RequestArray, slot: int, tokens: int, batch: FloatArray, block_size: int) -> bool:
    done = rows["computed_tokens"][slot]
    after = done + tokens + (rows["cached_tokens"][slot] if rows["running"][slot] == 0 else 0)
    return bool(blocks_for(after, block_size) - blocks_for(done, block_size) > batch[FREE_BLOCKS])


@njit(cache=True)
def _make_room(
    rows: RequestArray,
    slot: int,
    tokens: int,
    victims: SlotArray,
    state: IntArray,
    batch: FloatArray,
    block_size: int,
    preempt: SlotArray,
) -> bool:
    """Preempt best-effort ``victims`` (in order) until ``slot`` fits. ``state`` = [next victim, preempted so far]."""
    while _blocks_short(rows, slot, tokens, batch, block_size) and state[0] < len(victims):
        victim = victims[state[0]]
        state[0] += 1
        batch[FREE_BLOCKS] += blocks_for(rows["computed_tokens"][victim], block_size)
        batch[NUM_RUNNING] -= 1.0
        preempt[state[1]] = victim
        state[1] += 1
    return not _blocks_short(rows, slot, tokens, batch, block_size)


@njit(cache=True)
def _step_limit_s(due_s: FloatArray, now_s: float, full_s: float) -> float:
    """How long the step may last: until the earliest due time, a full batch at most."""
    limit_s = full_s
    for due in due_s:
        limit_s = min(limit_s, due - now_s)
    return limit_s


@njit(cache=True)
def _absorbable_s(
    rows: RequestArray,
    slot: int,
    decodes: SlotArray,
    due_s: FloatArray,
    now_s: float,
    coefficients: FloatArray,
    tpot_margin: float,
    all_decodes_s: float,
    all_fixed_s: float,
) -> float:
    """Length of a step that ends the only prompt there is beside every decode, if each can make up for the wait.

    A promise is about the mean of a stage. With nobody else waiting, a decode that comes late once catches up at the
    engine's own speed; it may be late by a part of what its forecast tokens can make up, never beyond its stall bound.
    0 when one of them could not.
    """
    done = rows["computed_tokens"][slot] + (0 if rows["running"][slot] == 1 else rows["cached_tokens"][slot])
    todo = max(rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done, 1)
    whole_s = linear_step_s(coefficients, float(len(decodes) + todo)) + all_fixed_s
    whole_s += coefficients[K_SEQ] + coefficients[K_CTX] * done + coefficients[K_Q] * todo * (todo + 2 * done)
    for j in range(len(decodes)):
        decode = decodes[j]
        late_s = now_s + whole_s - due_s[j]
        left = rows["expected_tokens"][decode] - rows["output_tokens"][decode]
        gain_s = rows["tpot_s"][decode] * (1.0 - tpot_margin) - all_decodes_s
        if late_s > 0.0 and late_s > CATCH_UP_SHARE * left * gain_s:
            return 0.0
        if now_s + whole_s > rows["last_token_s"][decode] + rows["max_stall_s"][decode]:
            return 0.0
    return float(whole_s)


@njit(cache=True)
def form_batch(  # noqa: C901 - one kernel: one pass in the order of the design's 4.5, on shared accumulators
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
    block_size: int,
    max_num_seqs: int,
    hold_decodes: bool,
    fixed_budget: int,
) -> tuple[SlotArray, IntArray, IntArray, SlotArray, IntArray, SlotArray, float]:
    """Form one step.

    Args:
        rows: the request table.
        running: slots that hold KV, in the engine's order.
        chosen: waiting slots that admission serves, in deadline order.
        leftover: waiting slots that may use what is left over, in the order they are to start.
        now_s: when the step starts.
        coefficients: float64 [8], margins already applied.
        tpot_margin: share of each TPOT kept in hand.
        max_tokens, free_blocks, block_size, max_num_seqs: the engine's limits.
        min_chunk: least prefill chunk in tokens, unless it ends its prompt.
        hold_decodes: decodes that can wait may be held when there is prefill to do.
        fixed_budget: token budget in place of the dynamic one; 0 for dynamic.

    Returns:
        slots, tokens, reasons (running ones first), held, held_reasons, preempt, predicted seconds.
    """
    num_running = len(running)
    most = num_running + len(chosen) + len(leftover)
    out_slots = np.empty(most, dtype=np.int64)
    out_tokens = np.empty(most, dtype=np.int64)
    out_reasons = np.empty(most, dtype=np.int64)
    count = 0
    held = np.empty(num_running, dtype=np.int64)
    held_reasons = np.empty(num_running, dtype=np.int64)
    num_held = 0
    preempt = np.empty(num_running, dtype=np.int64)
    evicted = np.zeros(2, dtype=np.int64)

    # Sort the running requests out: promised decodes and prefills, and those that only use what is left over.
    decodes = np.empty(num_running, dtype=np.int64)
    decode_due = np.empty(num_running)
    prefills = np.empty(num_running + len(chosen), dtype=np.int64)
    prefill_due = np.empty(num_running + len(chosen))
    extras = np.empty(num_running, dtype=np.int64)
    num_decodes, num_prefills, num_extras = 0, 0, 0
    shortest_s = np.inf
    for slot in running:
        todo = tokens_to_do(rows, slot)
        if todo <= 0 or rows["output_tokens"][slot] >= rows["max_tokens"][slot]:
            continue  # its last token is in flight
        if rows["status"][slot] != ADMITTED:
            extras[num_extras] = slot
            num_extras += 1
        elif rows["output_tokens"][slot] > 0 and todo <= 1:
            decodes[num_decodes] = slot
            decode_due[num_decodes] = next_due_s(rows, slot, tpot_margin)
            shortest_s = min(shortest_s, rows["tpot_s"][slot] * (1.0 - tpot_margin))
            num_decodes += 1
        else:
            prefills[num_prefills] = slot
            prefill_due[num_prefills] = next_due_s(rows, slot, tpot_margin)
            num_prefills += 1
    for slot in chosen:
        prefills[num_prefills] = slot
        prefill_due[num_prefills] = next_due_s(rows, slot, tpot_margin)
        num_prefills += 1
    order = np.argsort(decode_due[:num_decodes], kind="mergesort")
    decodes, decode_due = decodes[:num_decodes][order], decode_due[:num_decodes][order]
    order = np.argsort(prefill_due[:num_prefills], kind="mergesort")
    prefills, prefill_due = prefills[:num_prefills][order], prefill_due[:num_prefills][order]

    # Best effort gives way youngest first: the oldest keeps what it has done.
    victims = extras[:num_extras].copy()
    if num_extras > 1:
        victims = victims[np.argsort(-rows["order"][victims], kind="mergesort")]

    batch = np.zeros(4)
    batch[FREE_BLOCKS] = free_blocks
    batch[NUM_RUNNING] = num_running
    full_s = linear_step_s(coefficients, float(max_tokens))
    all_decodes_s, all_fixed_s = 0.0, 0.0
    if num_decodes > 0:
        context = 0.0
        for slot in decodes:
            context += rows["computed_tokens"][slot]
        all_fixed_s = coefficients[K_SEQ] * num_decodes + coefficients[K_CTX] * context
        all_decodes_s = linear_step_s(coefficients, float(num_decodes)) + all_fixed_s
        full_s += all_fixed_s
    limit_s = _step_limit_s(decode_due, now_s, full_s)

    if num_prefills == 1 and num_decodes > 0:
        whole_s = _absorbable_s(
            rows, prefills[0], decodes, decode_due, now_s, coefficients, tpot_margin, all_decodes_s, all_fixed_s
        )
        if whole_s <= full_s:
            limit_s = max(limit_s, whole_s)

    # 1. Decodes: those that would be late in the next batch, or all when nobody waits for prefill.
    guard_s = max(min(shortest_s, full_s), all_decodes_s)
    may_hold = hold_decodes and num_prefills > 0
    early = np.empty(num_decodes, dtype=np.int64)
    num_early = 0
    for j in range(num_decodes):
        slot = decodes[j]
        if may_hold and decode_due[j] > now_s + max(limit_s, 0.0) + guard_s:
            early[num_early] = slot
            num_early += 1
            continue
        if batch[TOKENS] + 1 > max_tokens:
            held[num_held] = slot
            held_reasons[num_held] = NO_ROOM
            num_held += 1
            continue
        if not _make_room(rows, slot, 1, victims, evicted, batch, block_size, preempt):
            held[num_held] = slot
            held_reasons[num_held] = NO_MEMORY
            num_held += 1
            continue
        _put(rows, slot, 1, coefficients, batch, block_size)
        out_slots[count] = slot
        out_tokens[count] = 1
        out_reasons[count] = DECODE_DUE
        count += 1
    limit_s = max(limit_s, batch_s(coefficients, batch))
    budget = max_tokens
    if fixed_budget > 0:
        limit_s, budget = np.inf, min(max_tokens, fixed_budget)

    # 2. Prefill chunks in deadline order; one that ends its prompt brings the step's end forward to its due time.
    waiting_started = False
    stopped = False
    for j in range(num_prefills):
        slot = prefills[j]
        is_running = rows["running"][slot] == 1
        done = rows["computed_tokens"][slot] + (0 if is_running else rows["cached_tokens"][slot])
        todo = rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done
        todo = max(todo, 1)
        chunk = 0
        if not stopped and (is_running or batch[NUM_RUNNING] < max_num_seqs or evicted[0] < len(victims)):
            chunk = min(todo, largest_chunk(coefficients, batch, limit_s, done), int(budget - batch[TOKENS]))
            if chunk < todo and (chunk < min_chunk or (is_running and waiting_started)):
                chunk = 0
        if chunk > 0 and not is_running:
            while batch[NUM_RUNNING] >= max_num_seqs and evicted[0] < len(victims):
                victim = victims[evicted[0]]
                evicted[0] += 1
                batch[FREE_BLOCKS] += blocks_for(rows["computed_tokens"][victim], block_size)
                batch[NUM_RUNNING] -= 1.0
                preempt[evicted[1]] = victim
                evicted[1] += 1
            if batch[NUM_RUNNING] >= max_num_seqs:
                chunk = 0
        reason = NO_ROOM
        # An engine starts a request only when its whole prompt fits.
        needed = chunk if is_running else todo
        if chunk > 0 and not _make_room(rows, slot, needed, victims, evicted, batch, block_size, preempt):
            chunk = 0
            reason = NO_MEMORY
        if chunk <= 0:
            if is_running:
                held[num_held] = slot
                held_reasons[num_held] = reason
                num_held += 1
            continue
        _put(rows, slot, chunk, coefficients, batch, block_size)
        out_slots[count] = slot
        out_tokens[count] = chunk
        out_reasons[count] = PREFILL_DEADLINE
        count += 1
        waiting_started = waiting_started or not is_running
        if chunk < todo:
            stopped = True
        elif fixed_budget == 0:
            limit_s = min(limit_s, max(prefill_due[j] - now_s, batch_s(coefficients, batch)))

    # 3. Decodes that could wait, while they fit.
    for j in range(num_early):
        slot = early[j]
        fits = batch[TOKENS] + 1 <= budget and not stopped
        if fits:
            after_s = (
                linear_step_s(coefficients, batch[TOKENS] + 1.0)
                + batch[FIXED_S]
                + coefficients[K_SEQ]
                + coefficients[K_CTX] * rows["computed_tokens"][slot]
            )
            fits = after_s <= limit_s + _EPSILON_S or count == 0
        if not fits or _blocks_short(rows, slot, 1, batch, block_size):
            held[num_held] = slot
            held_reasons[num_held] = HELD_AHEAD
            num_held += 1
            continue
        _put(rows, slot, 1, coefficients, batch, block_size)
        out_slots[count] = slot
        out_tokens[count] = 1
        out_reasons[count] = DECODE_EARLY
        count += 1

    # 4. Best effort: running decodes, running prefills, then new ones, oldest first.
    for kind in range(3):
        part = extras[:num_extras] if kind < 2 else leftover
        for slot in part:
            is_running = kind < 2
            done = rows["computed_tokens"][slot] + (0 if is_running else rows["cached_tokens"][slot])
            todo = max(rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done, 1)
            is_decode = is_running and rows["output_tokens"][slot] > 0 and todo <= 1
            if is_running and is_decode != (kind == 0):
                continue
            gone = False
            for j in range(evicted[1]):
                if preempt[j] == slot:
                    gone = True
            if gone:
                continue
            chunk = 0
            if not stopped and (is_running or batch[NUM_RUNNING] < max_num_seqs):
                chunk = min(todo, largest_chunk(coefficients, batch, limit_s, done), int(budget - batch[TOKENS]))
                if chunk < todo and (chunk < min_chunk or (is_running and waiting_started)):
                    chunk = 0
                if chunk > 0 and _blocks_short(rows, slot, chunk, batch, block_size):
                    chunk = 0
                # A new one starts only when its whole prompt fits: half a prompt only holds memory.
                if chunk > 0 and not is_running and _blocks_short(rows, slot, todo, batch, block_size):
                    chunk = 0
            if chunk <= 0:
                if is_running:
                    held[num_held] = slot
                    held_reasons[num_held] = NO_ROOM
                    num_held += 1
                elif not stopped and kind == 2:
                    stopped = True  # first come, first served among best effort
                continue
            _put(rows, slot, chunk, coefficients, batch, block_size)
            out_slots[count] = slot
            out_tokens[count] = chunk
            out_reasons[count] = BEST_EFFORT_ROOM
            count += 1
            waiting_started = waiting_started or not is_running
            if chunk < todo:
                stopped = True
    # The engine walks running requests before waiting ones.
    is_waiting = np.empty(count, dtype=np.int64)
    for j in range(count):
        is_waiting[j] = 1 - rows["running"][out_slots[j]]
    order = np.argsort(is_waiting, kind="mergesort")
    return (
        out_slots[:count][order],
        out_tokens[:count][order],
        out_reasons[:count][order],
        held[:num_held],
        held_reasons[:num_held],
        preempt[: evicted[1]],
        batch_s(coefficients, batch),
    )
