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
from slos_serve.perf.jit import in_place
from slos_serve.sim.block_cache import LOOK_UPS, BlockCache, evict, keep_computed, leave, look_up, referred_blocks, take
from slos_serve.sim.slots import Slots
from slos_serve.workload.calls import CallArray

IntArray = NDArray[np.int64]

# What a plan can do wrong; 0 is no fault.
NO_FAULT, TOO_MANY_TOKENS, NO_TOKENS, BEYOND_END, TWICE, TOO_MANY_SEQS, UNKNOWN_SLOT, WRONG_DRAFT = range(8)

# Positions in the totals that start_step returns.
NEW_TOKENS, CONTEXT_TOKENS, QUAD_TOKENS2, NUM_SEQS, DRAFT_STEPS, NUM_PREEMPTED, FREE_BLOCKS, NUM_RUNNING = range(8)
NO_ROOM, DRAFT_TOKENS, RECOMPUTED = 8, 9, 10
NUM_TOTALS = 11

# Outcomes of a call.
PENDING, COMPLETED, REJECTED, LOST = range(4)
# As in metrics.bulk.
_ROUNDING_S = _ROUNDING_SHARE = 1e-6


@in_place
def release(
    rows: RequestArray, slots: Slots, cache: BlockCache, running: IntArray, num_running: int, slot: int, block_size: int
) -> int:
    """Take a slot out of the running list and give its blocks back; returns how many can be had now."""
    place = 0
    for i in range(num_running):
        if running[i] == slot:
            place = i
            break
    for i in range(place, num_running - 1):
        running[i] = running[i + 1]
    blocks = slots.held[slot] - slots.referred[slot]
    blocks += leave(cache, slots.call_of[slot], slots.nodes[slot], rows["computed_tokens"][slot], block_size)
    slots.held[slot] = slots.referred[slot] = slots.nodes[slot] = 0
    rows["running"][slot] = 0
    return int(blocks)


@in_place
def preempt(
    rows: RequestArray, slots: Slots, cache: BlockCache, running: IntArray, num_running: int, slot: int, block_size: int
) -> int:
    """Take the KV of a running request away; returns the blocks that can be had now."""
    slots.lost[slot] = rows["computed_tokens"][slot]
    slots.brought[slot] = 0
    blocks = release(rows, slots, cache, running, num_running, slot, block_size)
    rows["computed_tokens"][slot] = 0
    rows["cached_tokens"][slot] = 0
    rows["fixed_blocks"][slot] = 0
    return blocks


@in_place
def look_up_waiting(rows: RequestArray, slots: Slots, cache: BlockCache, waiting: IntArray, block_size: int) -> None:
    """Write what is cached of the first waiting requests into their rows.

    ``fixed_blocks`` becomes minus the blocks that others hold already: a request that starts on them takes none.
    """
    for slot in waiting[:LOOK_UPS]:
        if slots.brought[slot] > 0:
            continue
        most = rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - 1
        tokens, _, unused = look_up(cache, slots.call_of[slot], most, block_size)
        rows["cached_tokens"][slot] = tokens
        rows["fixed_blocks"][slot] = min(unused - tokens // block_size, 0)


@in_place
def check_plan(
    rows: RequestArray,
    known: Slots,
    slots: IntArray,
    tokens: IntArray,
    drafts: IntArray,
    num_running: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> tuple[int, int]:
    """First fault of a plan and its position; ``(NO_FAULT, -1)`` when it keeps every rule."""
    total, starting, fault, where = 0, 0, NO_FAULT, -1
    checked = 0
    for i in range(len(slots)):
        slot = slots[i]
        if slot < 0 or slot >= len(rows) or known.call_of[slot] < 0:
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
        if known.seen[slot]:
            fault = TWICE
        elif tokens[i] <= 0:
            fault = NO_TOKENS
        elif draft < 0 or (draft > 0 and not decoding):
            fault = WRONG_DRAFT
        elif tokens[i] > left + draft or (draft > 0 and tokens[i] != 1 + draft):
            fault = BEYOND_END
        known.seen[slot] = 1
        if fault != NO_FAULT:
            where = i
            break
    for i in range(checked):
        known.seen[slots[i]] = 0
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
    known: Slots,
    cache: BlockCache,
    running: IntArray,
    num_running: int,
    plan: tuple[IntArray, IntArray, IntArray],
    free_blocks: int,
    block_size: int,
) -> IntArray:
    """Give blocks to a checked plan and start what is waiting; fills ``known.step_*`` and ``known.scratch``.

    ``computed_tokens`` of a slot that starts becomes its cached prefix; of a preempted slot, 0. Everything else of a
    row changes in :func:`finish_step`.

    Args:
        running: slots that hold KV; its first ``num_running`` entries, changed.
        plan: slots, tokens and drafts (empty: none) of each entry.
        free_blocks: blocks that can be had, unused cached ones counted in.

    Returns:
        int64 [NUM_TOTALS]: shape of the batch and what happened to blocks and lists; ``known.scratch`` begins with the
        slots that were preempted.
    """
    slots, tokens, drafts = plan
    totals = np.zeros(NUM_TOTALS, dtype=np.int64)
    count = 0
    num_preempted = 0
    for i in range(len(slots)):
        slot = slots[i]
        starts = rows["running"][slot] == 0
        if starts and num_preempted > 0:
            continue  # nothing starts in a step that preempted; a victim may itself stand later in the plan
        chunk, nodes = tokens[i], 0
        if starts:
            done, nodes, unused = _found(rows, known, cache, slot, block_size)
            chunk = min(chunk, rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done)
            referred = done // block_size if nodes > 0 else 0
            need = _blocks_of(done + chunk, block_size) - referred + unused
            if need > free_blocks:
                totals[NO_ROOM] += 1
                break
        else:
            done = rows["computed_tokens"][slot]
            need = _blocks_of(done + chunk, block_size) - known.held[slot]
        lost = False
        while need > free_blocks:
            victim = running[num_running - 1]
            free_blocks += preempt(rows, known, cache, running, num_running, victim, block_size)
            num_running -= 1
            known.scratch[num_preempted] = victim
            num_preempted += 1
            count = _dropped(known, count, victim)
            if victim == slot:
                lost = True
                break
        if lost:
            continue
        if starts:
            take(cache, known.call_of[slot], nodes)
            known.nodes[slot], known.referred[slot] = nodes, referred
            known.held[slot] = referred - unused
            if known.lost[slot] == 0:
                known.hit[slot] = done if nodes > 0 else 0
            totals[RECOMPUTED] += max(known.lost[slot] - done, 0)
            known.lost[slot] = 0
            rows["running"][slot] = 1
            rows["computed_tokens"][slot] = rows["cached_tokens"][slot] = done
            running[num_running] = slot
            num_running += 1
        if need > 0:
            free_blocks -= need
            known.held[slot] += need
            evict(cache, free_blocks)
        known.step_slots[count] = slot
        known.step_tokens[count] = chunk
        known.step_drafts[count] = drafts[i] if len(drafts) > 0 else 0
        count += 1
    _add_up(rows, known, count, totals)
    totals[NUM_PREEMPTED] = num_preempted
    totals[FREE_BLOCKS] = free_blocks
    totals[NUM_RUNNING] = num_running
    return totals


@in_place
def _blocks_of(tokens: int, block_size: int) -> int:
    return (tokens + block_size - 1) // block_size


@in_place
def _found(rows: RequestArray, known: Slots, cache: BlockCache, slot: int, block_size: int) -> tuple[int, int, int]:
    """Tokens that a slot has when it starts, the nodes they lie in, and how many of their blocks nobody uses."""
    if known.brought[slot] > 0:
        return int(known.brought[slot]), 0, 0
    most = rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - 1
    return look_up(cache, known.call_of[slot], most, block_size)


@in_place
def _dropped(known: Slots, count: int, victim: int) -> int:
    """Take a preempted slot out of the step again; returns the entries that are left."""
    for j in range(count):
        if known.step_slots[j] == victim:
            for k in range(j, count - 1):
                known.step_slots[k] = known.step_slots[k + 1]
                known.step_tokens[k] = known.step_tokens[k + 1]
                known.step_drafts[k] = known.step_drafts[k + 1]
            return count - 1
    return count


@in_place
def _add_up(rows: RequestArray, known: Slots, count: int, totals: IntArray) -> None:
    """Shape of the batch."""
    for i in range(count):
        slot, tokens = known.step_slots[i], known.step_tokens[i]
        done = rows["computed_tokens"][slot]
        left = rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done
        totals[NEW_TOKENS] += tokens
        totals[CONTEXT_TOKENS] += done
        if rows["output_tokens"][slot] == 0 or left > 1:
            totals[QUAD_TOKENS2] += tokens * (tokens + 2 * done)
        totals[DRAFT_STEPS] = max(totals[DRAFT_STEPS], known.step_drafts[i])
        totals[DRAFT_TOKENS] += known.step_drafts[i]
    totals[NUM_SEQS] = count


@in_place
def uniform(seed: int, call: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments only (splitmix64): a draft is right under every policy alike."""
    x = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(call) * np.uint64(0xBF58476D1CE4E5B9)
    x += np.uint64(position) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return float(x >> np.uint64(11)) / 9007199254740992.0


@in_place
def _later(took_s: float, promised_s: float) -> bool:
    """With the slack of the score: token times are kept as float32."""
    return took_s > promised_s * (1.0 + _ROUNDING_SHARE) + _ROUNDING_S


@in_place
def finish_step(
    rows: RequestArray,
    known: Slots,
    cache: BlockCache,
    calls: CallArray,
    arrivals_s: NDArray[np.float64],
    count: int,
    end_s: float,
    seed: int,
    token_s: NDArray[np.float32],
    token_start: IntArray,
    block_size: int,
) -> int:
    """Advance every request of the step to its end; returns how many finished (their slots in ``known.scratch``).

    ``token_s[token_start[call] + k]`` becomes the time of token ``k`` after the call's arrival. ``known.step_accepted``
    becomes how many drafts of each entry were right; -1 where nothing was drafted or the answer ended.
    """
    num_finished = 0
    for i in range(count):
        slot, drafts = known.step_slots[i], known.step_drafts[i]
        call = known.call_of[slot]
        before = rows["output_tokens"][slot]
        total = rows["prompt_tokens"][slot] + before
        done = rows["computed_tokens"][slot] + known.step_tokens[i] - drafts
        known.step_accepted[i] = -1
        if known.step_tokens[i] > 1 + drafts or before == 0:
            # Not all of its last node need be its own context: it may have found less than is cached of that.
            known.referred[slot] -= referred_blocks(cache, call, known.nodes[slot], block_size)
            known.nodes[slot] = keep_computed(cache, call, known.nodes[slot], done, block_size)
            known.referred[slot] += referred_blocks(cache, call, known.nodes[slot], block_size)
        if done < total:
            rows["computed_tokens"][slot] = done
            continue
        target = calls["output_tokens"][call]
        new_tokens = 1
        while new_tokens <= drafts and before + new_tokens < target:
            if uniform(seed, call, before + new_tokens) >= calls["acceptance"][call]:
                break
            new_tokens += 1
        rows["computed_tokens"][slot] = total + new_tokens - 1
        rows["output_tokens"][slot] = before + new_tokens
        rows["last_token_s"][slot] = end_s
        for k in range(before, before + new_tokens):
            token_s[token_start[call] + k] = end_s - arrivals_s[call]
            _count_token(rows, slot, calls, call, k, target, end_s)
        if before + new_tokens >= target:
            known.scratch[num_finished] = slot
            num_finished += 1
        elif drafts > 0:
            known.step_accepted[i] = new_tokens - 1
    return num_finished


@in_place
def _count_token(
    rows: RequestArray, slot: int, calls: CallArray, call: int, position: int, target: int, end_s: float
) -> None:
    """Note token ``position`` of an answer of ``target`` tokens in its row.

    At the end of the first of two stages the promise changes; the new stage begins with the next token. ``missed``
    becomes 1 with a promise that is broken for good: what scores the run (``metrics.bulk``) decides the same.
    """
    took_s, arrival_s = end_s - rows["arrival_s"][slot], rows["arrival_s"][slot]
    if position == 0 and _later(took_s, rows["promised_ttft_due_s"][slot] - arrival_s):
        rows["missed"][slot] = 1
    if position + 1 == target and _later(took_s, rows["answer_due_s"][slot] - arrival_s):
        rows["missed"][slot] = 1
    if rows["stage_tokens"][slot] == 0:
        rows["stage_start_s"][slot] = end_s
    rows["stage_tokens"][slot] += 1
    if position + 1 == calls["first_stage_tokens"][call] or position + 1 == target:
        gaps = rows["stage_tokens"][slot] - 1
        if gaps > 0 and _later(end_s - rows["stage_start_s"][slot], gaps * rows["promised_tpot_s"][slot]):
            rows["missed"][slot] = 1
    if position + 1 == calls["first_stage_tokens"][call] and position + 1 < target:
        rows["tpot_s"][slot] = rows["promised_tpot_s"][slot] = calls["next_tpot_s"][call]
        rows["stage_start_s"][slot] = np.nan
        rows["stage_tokens"][slot] = 0


@in_place
def keep_waiting(rows: RequestArray, waiting: IntArray, num_waiting: int) -> int:
    """Drop the slots that started from the waiting list, order kept; returns the new length."""
    kept = 0
    for i in range(num_waiting):
        if rows["running"][waiting[i]] == 0:
            waiting[kept] = waiting[i]
            kept += 1
    return kept
