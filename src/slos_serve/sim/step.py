"""Executes one step plan on the arrays of a replica: KV blocks, progress, token times. Jitted, no policy in here.

The memory rules are vLLM's: a running request that finds no block preempts the request that started last (which may be
itself) and recomputes its tokens later; a waiting request that finds none does not start, nor does anything behind it;
after a preemption nothing starts in that step. Every rule that a plan must keep is checked, not trusted.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.core.request import RequestArray
from slos_serve.workload.calls import CallArray

IntArray = NDArray[np.int64]

# What a plan can do wrong; 0 is no fault.
NO_FAULT, TOO_MANY_TOKENS, NO_TOKENS, BEYOND_END, TWICE, TOO_MANY_SEQS, UNKNOWN_SLOT, WRONG_DRAFT = range(8)

# Positions in the totals that start_step returns.
NEW_TOKENS, CONTEXT_TOKENS, QUAD_TOKENS2, NUM_SEQS, DRAFT_STEPS, NUM_PREEMPTED, FREE_BLOCKS, NUM_RUNNING = range(8)
NO_ROOM, DRAFT_TOKENS = 8, 9
NUM_TOTALS = 10

# Outcomes of a call.
PENDING, COMPLETED, REJECTED, LOST = range(4)
# As in metrics.bulk.
_ROUNDING_S = _ROUNDING_SHARE = 1e-6


@njit(cache=True)
def release(rows: RequestArray, held_blocks: IntArray, running: IntArray, num_running: int, slot: int) -> int:
    """Take a slot out of the running list and give its blocks back; returns how many."""
    place = 0
    for i in range(num_running):
        if running[i] == slot:
            place = i
            break
    for i in range(place, num_running - 1):
        running[i] = running[i + 1]
    blocks = held_blocks[slot]
    held_blocks[slot] = 0
    rows["running"][slot] = 0
    return int(blocks)


@njit(cache=True)
def check_plan(
    rows: RequestArray,
    present: NDArray[np.bool_],
    slots: IntArray,
    tokens: IntArray,
    drafts: IntArray,
    num_running: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    seen: NDArray[np.bool_],
) -> tuple[int, int]:
    """First fault of a plan and its position; ``(NO_FAULT, -1)`` when it keeps every rule."""
    total, starting, fault, where = 0, 0, NO_FAULT, -1
    checked = 0
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0 or slot >= len(rows) or not present[slot]:
            return UNKNOWN_SLOT, i
        checked = i + 1
        draft = drafts[i] if len(drafts) > 0 else 0
        done = rows["computed_tokens"][slot]
        if rows["running"][slot] == 0:
            starting += 1
            done = rows["cached_tokens"][slot]
        left = rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done
        decoding = rows["output_tokens"][slot] > 0 and left == 1
        total += tokens[i]
        if seen[slot]:
            fault = TWICE
        elif tokens[i] <= 0:
            fault = NO_TOKENS
        elif draft < 0 or (draft > 0 and not decoding):
            fault = WRONG_DRAFT
        elif tokens[i] > left + draft or (draft > 0 and tokens[i] != 1 + draft):
            fault = BEYOND_END
        seen[slot] = True
        if fault != NO_FAULT:
            where = i
            break
    for i in range(checked):
        seen[slots[i]] = False
    if fault != NO_FAULT:
        return fault, where
    if total > max_num_batched_tokens:
        return TOO_MANY_TOKENS, -1
    if num_running + starting > max_num_seqs:
        return TOO_MANY_SEQS, -1
    return NO_FAULT, -1


@njit(cache=True)
def start_step(
    rows: RequestArray,
    held_blocks: IntArray,
    running: IntArray,
    num_running: int,
    slots: IntArray,
    tokens: IntArray,
    drafts: IntArray,
    free_blocks: int,
    block_size: int,
    step_slots: IntArray,
    step_tokens: IntArray,
    step_drafts: IntArray,
    preempted: IntArray,
) -> IntArray:
    """Give blocks to a checked plan and start what is waiting; fills ``step_*`` and ``preempted``.

    ``computed_tokens`` of a slot that starts becomes its cached prefix; of a preempted slot, 0. Everything else of a
    row changes in :func:`finish_step`.

    Returns:
        int64 [NUM_TOTALS]: shape of the batch and what happened to blocks and lists.
    """
    totals = np.zeros(NUM_TOTALS, dtype=np.int64)
    count = 0
    num_preempted = 0
    for i in range(len(slots)):
        slot = slots[i]
        starts = rows["running"][slot] == 0
        if starts and num_preempted > 0:
            continue  # nothing starts in a step that preempted; a victim may itself stand later in the plan
        done = rows["cached_tokens"][slot] if starts else rows["computed_tokens"][slot]
        need = (done + tokens[i] + block_size - 1) // block_size - held_blocks[slot]
        if starts and need > free_blocks:
            totals[NO_ROOM] += 1
            break
        lost = False
        while need > free_blocks:
            victim = running[num_running - 1]
            free_blocks += release(rows, held_blocks, running, num_running, victim)
            num_running -= 1
            rows["computed_tokens"][victim] = 0
            rows["cached_tokens"][victim] = 0
            preempted[num_preempted] = victim
            num_preempted += 1
            for j in range(count):
                if step_slots[j] == victim:
                    for k in range(j, count - 1):
                        step_slots[k] = step_slots[k + 1]
                        step_tokens[k] = step_tokens[k + 1]
                        step_drafts[k] = step_drafts[k + 1]
                    count -= 1
                    break
            if victim == slot:
                lost = True
                break
        if lost:
            continue
        if need > 0:
            free_blocks -= need
            held_blocks[slot] += need
        if starts:
            rows["running"][slot] = 1
            rows["computed_tokens"][slot] = done
            running[num_running] = slot
            num_running += 1
        step_slots[count] = slot
        step_tokens[count] = tokens[i]
        step_drafts[count] = drafts[i] if len(drafts) > 0 else 0
        count += 1
    for i in range(count):
        slot = step_slots[i]
        done = rows["computed_tokens"][slot]
        left = rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done
        totals[NEW_TOKENS] += step_tokens[i]
        totals[CONTEXT_TOKENS] += done
        if rows["output_tokens"][slot] == 0 or left > 1:
            totals[QUAD_TOKENS2] += step_tokens[i] * (step_tokens[i] + 2 * done)
        totals[DRAFT_STEPS] = max(totals[DRAFT_STEPS], step_drafts[i])
        totals[DRAFT_TOKENS] += step_drafts[i]
    totals[NUM_SEQS] = count
    totals[NUM_PREEMPTED] = num_preempted
    totals[FREE_BLOCKS] = free_blocks
    totals[NUM_RUNNING] = num_running
    return totals


@njit(cache=True)
def uniform(seed: int, call: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments only (splitmix64): a draft is right under every policy alike."""
    x = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(call) * np.uint64(0xBF58476D1CE4E5B9)
    x += np.uint64(position) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return float(x >> np.uint64(11)) / 9007199254740992.0


@njit(cache=True)
def _later(took_s: float, promised_s: float) -> bool:
    """With the slack of the score: token times are kept as float32."""
    return took_s > promised_s * (1.0 + _ROUNDING_SHARE) + _ROUNDING_S


@njit(cache=True)
def finish_step(
    rows: RequestArray,
    call_of: IntArray,
    calls: CallArray,
    arrivals_s: NDArray[np.float64],
    step_slots: IntArray,
    step_tokens: IntArray,
    step_drafts: IntArray,
    count: int,
    end_s: float,
    seed: int,
    token_s: NDArray[np.float32],
    token_start: IntArray,
    finished: IntArray,
    accepted: IntArray,
) -> int:
    """Advance every request of the step to its end; returns how many finished (their slots in ``finished``).

    ``token_s[token_start[call] + k]`` becomes the time of token ``k`` after the call's arrival. At the end of the first
    of two stages the promise changes; the new stage begins with the next token. ``missed`` becomes 1 with a promise
    that is broken for good: what scores the run (``metrics.bulk``) decides the same. ``accepted`` becomes how many
    drafts of each entry were right; -1 where nothing was drafted or the answer ended.
    """
    num_finished = 0
    for i in range(count):
        slot = step_slots[i]
        before = rows["output_tokens"][slot]
        total = rows["prompt_tokens"][slot] + before
        done = rows["computed_tokens"][slot] + step_tokens[i] - step_drafts[i]
        accepted[i] = -1
        if done < total:
            rows["computed_tokens"][slot] = done
            continue
        call = call_of[slot]
        target = calls["output_tokens"][call]
        new_tokens = 1
        while new_tokens <= step_drafts[i] and before + new_tokens < target:
            if uniform(seed, call, before + new_tokens) >= calls["acceptance"][call]:
                break
            new_tokens += 1
        rows["computed_tokens"][slot] = total + new_tokens - 1
        rows["output_tokens"][slot] = before + new_tokens
        rows["last_token_s"][slot] = end_s
        for k in range(before, before + new_tokens):
            token_s[token_start[call] + k] = end_s - arrivals_s[call]
            if k == 0 and _later(end_s - rows["arrival_s"][slot], rows["ttft_due_s"][slot] - rows["arrival_s"][slot]):
                rows["missed"][slot] = 1
            if rows["stage_tokens"][slot] == 0:
                rows["stage_start_s"][slot] = end_s
            rows["stage_tokens"][slot] += 1
            if k + 1 == calls["first_stage_tokens"][call] or k + 1 == target:
                gaps = rows["stage_tokens"][slot] - 1
                if gaps > 0 and _later(end_s - rows["stage_start_s"][slot], gaps * rows["tpot_s"][slot]):
                    rows["missed"][slot] = 1
            if k + 1 == calls["first_stage_tokens"][call] and k + 1 < target:
                rows["tpot_s"][slot] = calls["next_tpot_s"][call]
                rows["stage_start_s"][slot] = np.nan
                rows["stage_tokens"][slot] = 0
        if before + new_tokens >= target:
            finished[num_finished] = slot
            num_finished += 1
        elif step_drafts[i] > 0:
            accepted[i] = new_tokens - 1
    return num_finished


@njit(cache=True)
def keep_waiting(rows: RequestArray, waiting: IntArray, num_waiting: int) -> int:
    """Drop the slots that started from the waiting list, order kept; returns the new length."""
    kept = 0
    for i in range(num_waiting):
        if rows["running"][waiting[i]] == 0:
            waiting[kept] = waiting[i]
            kept += 1
    return kept
