"""The two ways stock engines fill a batch in queue order, as kernels: chunked (one token budget) and prefill first.

Shared by the baselines; each policy's own file says which one it is and what it changes. Memory rules are the engine's:
a waiting request starts only when its whole prompt fits in the free blocks, and nothing behind it may pass it.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.core.plan import Reason, StepPlan
from slos_serve.core.request import RequestArray

IntArray = NDArray[np.int64]


@njit(cache=True)
def tokens_left(rows: RequestArray, slot: int) -> int:
    """Tokens to compute before the next output token; 1 for a decode. A cached prefix counts as computed."""
    done = rows["computed_tokens"][slot] if rows["running"][slot] else rows["cached_tokens"][slot]
    return int(rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done)


@njit(cache=True)
def blocks_of(tokens: int, block_size: int) -> int:
    """Whole blocks that hold ``tokens``."""
    return (tokens + block_size - 1) // block_size


@njit(cache=True)
def chunked(
    rows: RequestArray,
    running: IntArray,
    waiting: IntArray,
    token_budget: int,
    max_num_seqs: int,
    free_blocks: int,
    block_size: int,
    reserve_blocks: int,
    slots: IntArray,
    tokens: IntArray,
) -> int:
    """Running requests in their order, then waiting ones, each with as much as the token budget leaves.

    ``reserve_blocks`` stay free when a waiting request starts. Returns the number of entries written.
    """
    count = 0
    for slot in running:
        if token_budget <= 0:
            break
        chunk = min(tokens_left(rows, slot), token_budget)
        done = rows["computed_tokens"][slot]
        free_blocks -= blocks_of(done + chunk, block_size) - blocks_of(done, block_size)
        slots[count], tokens[count] = slot, chunk
        token_budget -= chunk
        count += 1
    num_running = len(running)
    for slot in waiting:
        whole = blocks_of(rows["prompt_tokens"][slot] + rows["output_tokens"][slot], block_size)
        if token_budget <= 0 or num_running >= max_num_seqs or whole + reserve_blocks > free_blocks:
            break
        chunk = min(tokens_left(rows, slot), token_budget)
        free_blocks -= blocks_of(rows["cached_tokens"][slot] + chunk, block_size)
        slots[count], tokens[count] = slot, chunk
        token_budget -= chunk
        num_running += 1
        count += 1
    return count


@njit(cache=True)
def whole_prompts(
    rows: RequestArray,
    waiting: IntArray,
    num_running: int,
    token_budget: int,
    max_num_seqs: int,
    free_blocks: int,
    block_size: int,
    reserve_blocks: int,
    slots: IntArray,
    tokens: IntArray,
) -> int:
    """Waiting requests in order, each with its whole prompt, while they fit; returns the number of entries.

    The first prompt may exceed the budget: an engine without chunks has to run it in one batch.
    """
    count = 0
    total = 0
    for slot in waiting:
        left = tokens_left(rows, slot)
        need = blocks_of(rows["prompt_tokens"][slot] + rows["output_tokens"][slot], block_size)
        if (
            num_running >= max_num_seqs
            or need + reserve_blocks > free_blocks
            or (count and total + left > token_budget)
        ):
            break
        slots[count], tokens[count] = slot, left
        free_blocks -= need
        total += left
        num_running += 1
        count += 1
    return count


def step_plan(slots: IntArray, tokens: IntArray, reason: Reason = Reason.STOCK_ORDER) -> StepPlan:
    """A plan that runs ``slots`` with ``tokens``, all for one reason."""
    return StepPlan(slots=slots, tokens=tokens, reasons=np.full(len(slots), int(reason), dtype=np.int64))
