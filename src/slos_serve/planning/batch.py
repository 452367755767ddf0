"""A batch being formed: what is in it, what it costs in seconds and KV blocks, who was preempted for it.

Room is counted by the batch-time model and in whole blocks. A request short of blocks or of a place among the running
ones takes them from the batch's victims, in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.batch_time import B_C, B_M, K_C, K_CTX, K_M, K_Q, K_S, K_SEQ
from slos_serve.planning.prefill_rate import FloatArray, IntArray, linear_step_s

# Positions in Batch.sums and Batch.counts.
TOKENS, FIXED_S, FREE_BLOCKS, NUM_RUNNING, DRAFT_STEPS = range(5)
NUM_ENTRIES, NUM_HELD, NUM_PREEMPTED = range(3)


class Limits(NamedTuple):
    """What bounds a batch: the batch-time model (margins applied) and the engine's limits."""

    coefficients: FloatArray
    max_tokens: int
    min_chunk: int
    block_size: int
    max_num_seqs: int


class Batch(NamedTuple):
    """Arrays that the kernels change in place. Kernels called for every request take the arrays themselves: reading one
    out of the tuple costs more than what they do with it.

    Attributes:
        sums: float64 [5], tokens, seconds beside the roofline part, free KV blocks, running requests, draft steps.
        counts: int64 [3], how many entries, held and preempted there are.
        entries: int64 [4, most], slots, tokens, reasons and draft lengths of requests that run.
        held: int64 [2, running], slots and reasons of running requests that do not.
        victims: int64, who may be preempted, first to go first; those below the number preempted are.
    """

    sums: FloatArray
    counts: IntArray
    entries: IntArray
    held: IntArray
    victims: SlotArray


@njit(cache=True)
def empty_batch(most: int, num_running: int, free_blocks: int, victims: SlotArray) -> Batch:
    """A batch with room for ``most`` entries on an engine with ``num_running`` requests inside."""
    sums = np.zeros(5)
    sums[FREE_BLOCKS] = free_blocks
    sums[NUM_RUNNING] = num_running
    entries, held = np.empty((4, most), dtype=np.int64), np.empty((2, num_running), dtype=np.int64)
    return Batch(sums, np.zeros(3, dtype=np.int64), entries, held, victims)


@njit(cache=True)
def blocks_for(tokens: int, block_size: int) -> int:
    """KV blocks that hold ``tokens``."""
    return (tokens + block_size - 1) // block_size


@njit(cache=True)
def tokens_done(rows: RequestArray, slot: int) -> int:
    """Tokens that need not be computed: those with KV, and for a waiting request those that its prefix cache has."""
    if rows["running"][slot] == 1:
        return int(rows["computed_tokens"][slot])
    return int(rows["computed_tokens"][slot] + rows["cached_tokens"][slot])


@njit(cache=True)
def tokens_left(rows: RequestArray, slot: int) -> int:
    """Tokens to compute before the next one can be sampled; at least 1."""
    return int(max(rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - tokens_done(rows, slot), 1))


@njit(cache=True)
def beyond_roofline_s(coefficients: FloatArray, tokens: int, done: int) -> float:
    """Seconds that a request with ``tokens`` new ones after ``done`` adds to a batch beside its roofline part."""
    seconds = coefficients[K_SEQ] + coefficients[K_CTX] * done
    if tokens > 1:
        seconds += coefficients[K_Q] * tokens * (tokens + 2 * done)
    return float(seconds)


@njit(cache=True)
def largest_chunk(coefficients: FloatArray, sums: FloatArray, limit_s: float, done: int) -> int:
    """Most prefill tokens, after ``done`` computed ones, that keep the batch within ``limit_s``."""
    fixed_s = sums[FIXED_S] + coefficients[K_SEQ] + coefficients[K_CTX] * done
    square = coefficients[K_Q]
    largest = 1e12
    for branch in range(2):
        slope = coefficients[K_C] if branch == 0 else coefficients[K_M]
        constant = coefficients[B_C] if branch == 0 else coefficients[B_M]
        room_s = limit_s - fixed_s - constant - slope * sums[TOKENS]
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
def batch_s(coefficients: FloatArray, sums: FloatArray) -> float:
    """Predicted seconds of the batch so far."""
    if sums[TOKENS] <= 0.0:
        return 0.0
    return float(linear_step_s(coefficients, sums[TOKENS]) + sums[FIXED_S])


@njit(cache=True)
def put(
    rows: RequestArray,
    slot: int,
    tokens: int,
    reason: int,
    coefficients: FloatArray,
    block_size: int,
    sums: FloatArray,
    counts: IntArray,
    entries: IntArray,
) -> None:
    """Add a request with ``tokens`` new ones to the batch."""
    done = tokens_done(rows, slot)
    if rows["running"][slot] == 0:
        sums[NUM_RUNNING] += 1.0
    sums[TOKENS] += tokens
    sums[FIXED_S] += beyond_roofline_s(coefficients, tokens, done)
    sums[FREE_BLOCKS] -= blocks_for(done + tokens, block_size) - blocks_for(rows["computed_tokens"][slot], block_size)
    at = counts[NUM_ENTRIES]
    entries[0, at], entries[1, at], entries[2, at], entries[3, at] = slot, tokens, reason, 0
    counts[NUM_ENTRIES] = at + 1


@njit(cache=True)
def put_decode(
    rows: RequestArray,
    slot: int,
    draft: int,
    reason: int,
    coefficients: FloatArray,
    block_size: int,
    sums: FloatArray,
    counts: IntArray,
    entries: IntArray,
) -> None:
    """Add a decode that verifies ``draft`` draft tokens: they are decoded together, its context read once."""
    put(rows, slot, 1, reason, coefficients, block_size, sums, counts, entries)
    if draft > 0:
        done = rows["computed_tokens"][slot]
        sums[TOKENS] += draft
        sums[FREE_BLOCKS] -= blocks_for(done + 1 + draft, block_size) - blocks_for(done + 1, block_size)
        sums[FIXED_S] += coefficients[K_SEQ] * draft + coefficients[K_S] * max(draft - sums[DRAFT_STEPS], 0.0)
        sums[DRAFT_STEPS] = max(sums[DRAFT_STEPS], draft)
        at = counts[NUM_ENTRIES] - 1
        entries[1, at], entries[3, at] = 1 + draft, draft


@njit(cache=True)
def hold(slot: int, reason: int, counts: IntArray, held: IntArray) -> None:
    """Leave a running request out of the batch."""
    at = counts[NUM_HELD]
    held[0, at], held[1, at] = slot, reason
    counts[NUM_HELD] = at + 1


@njit(cache=True)
def blocks_short(rows: RequestArray, slot: int, tokens: int, block_size: int, sums: FloatArray) -> bool:
    """Whether there are too few free KV blocks for ``tokens`` more of a request."""
    after = blocks_for(tokens_done(rows, slot) + tokens, block_size)
    return bool(after - blocks_for(rows["computed_tokens"][slot], block_size) > sums[FREE_BLOCKS])


@njit(cache=True)
def make_room(
    rows: RequestArray,
    slot: int,
    tokens: int,
    block_size: int,
    max_num_seqs: int,
    sums: FloatArray,
    counts: IntArray,
    victims: SlotArray,
) -> bool:
    """Preempt victims until ``slot`` has a place among the running and blocks for ``tokens`` more; whether it has."""
    starts = rows["running"][slot] == 0
    while (starts and sums[NUM_RUNNING] >= max_num_seqs) or blocks_short(rows, slot, tokens, block_size, sums):
        if counts[NUM_PREEMPTED] >= len(victims):
            return False
        victim = victims[counts[NUM_PREEMPTED]]
        counts[NUM_PREEMPTED] += 1
        sums[FREE_BLOCKS] += blocks_for(rows["computed_tokens"][victim], block_size)
        sums[NUM_RUNNING] -= 1.0
    return True


@njit(cache=True)
def is_preempted(slot: int, counts: IntArray, victims: SlotArray) -> bool:
    """Whether a request was preempted for this batch."""
    found = False
    for j in range(counts[NUM_PREEMPTED]):
        found = found or victims[j] == slot
    return found
