"""The two ways stock engines fill a batch in queue order, as kernels: chunked (one token budget) and prefill first.

Shared by the baselines; each policy's own file says which one it is and what it changes. Memory rules are the engine's:
a waiting request starts only when its whole prompt fits in the free blocks, and nothing behind it may pass it.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.request import MAX_DRAFT_TOKENS, RequestArray
from slos_serve.core.slo import check_number

IntArray = NDArray[np.int64]


@njit(cache=True)
def tokens_left(rows: RequestArray, slot: int) -> int:
    """Tokens to compute before the next output token; 1 for a decode. A cached prefix counts as computed."""
    done = rows["computed_tokens"][slot] + (0 if rows["running"][slot] else rows["cached_tokens"][slot])
    return int(rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done)


@njit(cache=True)
def blocks_of(tokens: int, block_size: int) -> int:
    """Whole blocks that hold ``tokens``."""
    return (tokens + block_size - 1) // block_size


@njit(cache=True)
def drafts_for(rows: RequestArray, slot: int, draft_tokens: int, token_budget: int) -> int:
    """Drafts that a running decode verifies when all decodes draft ``draft_tokens``: 0 for a prefill.

    Fewer when the step's budget or what the request may still generate leaves no more.
    """
    if rows["output_tokens"][slot] == 0 or tokens_left(rows, slot) != 1:
        return 0
    left = rows["max_tokens"][slot] - rows["output_tokens"][slot] - 1
    return int(max(min(draft_tokens, left, token_budget - 1), 0))


@njit(cache=True)
def draft_all(
    rows: RequestArray, decodes: IntArray, draft_tokens: int, token_budget: int, free_blocks: int, block_size: int
) -> IntArray:
    """int64 [n]: drafts of a step of ``decodes`` alone, in their order, each at least left its own token and block."""
    drafts = np.zeros(len(decodes), dtype=np.int64)
    if draft_tokens == 0:
        return drafts
    token_budget -= len(decodes)
    for slot in decodes:
        done = rows["computed_tokens"][slot]
        free_blocks -= blocks_of(done + 1, block_size) - blocks_of(done, block_size)
    for i in range(len(decodes)):
        slot = decodes[i]
        draft = drafts_for(rows, slot, draft_tokens, token_budget + 1)
        done = rows["computed_tokens"][slot]
        needed = blocks_of(done + 1 + draft, block_size) - blocks_of(done + 1, block_size)
        if needed <= free_blocks:
            drafts[i] = draft
            token_budget -= draft
            free_blocks -= needed
    return drafts


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
    draft_tokens: int,
    drafts: IntArray,
) -> int:
    """Running requests in their order, then waiting ones, each with as much as the token budget leaves.

    Decodes verify ``draft_tokens`` drafts each, written to ``drafts``. ``reserve_blocks`` stay free when a waiting
    request starts. Returns the number of entries written.
    """
    count = 0
    for slot in running:
        if token_budget <= 0:
            break
        draft = drafts_for(rows, slot, draft_tokens, token_budget) if draft_tokens > 0 else 0
        chunk = min(tokens_left(rows, slot) + draft, token_budget)
        done = rows["computed_tokens"][slot]
        free_blocks -= blocks_of(done + chunk, block_size) - blocks_of(done, block_size)
        slots[count], tokens[count], drafts[count] = slot, chunk, draft
        token_budget -= chunk
        count += 1
    num_running = len(running)
    for slot in waiting:
        whole = blocks_of(rows["prompt_tokens"][slot] + rows["output_tokens"][slot], block_size)
        if token_budget <= 0 or num_running >= max_num_seqs or whole + reserve_blocks > free_blocks:
            break
        chunk = min(tokens_left(rows, slot), token_budget)
        free_blocks -= blocks_of(rows["cached_tokens"][slot] + chunk, block_size)
        slots[count], tokens[count], drafts[count] = slot, chunk, 0
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
    most_tokens: int,
) -> int:
    """Waiting requests in order, each with its whole prompt, while they fit; returns the number of entries.

    The first prompt may exceed the budget: an engine without chunks has to run it in one batch, or in as few of
    ``most_tokens`` as it takes.
    """
    count = 0
    total = 0
    for slot in waiting:
        left = min(tokens_left(rows, slot), most_tokens)
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
        if left < tokens_left(rows, slot):
            break
    return count


def rest_of_prompt(view: EngineView) -> StepPlan | None:
    """For engines without chunks: a step that goes on with what was longer than any batch, ``None`` without such.

    A prompt, or what a request has to compute again after a preemption.
    """
    slot = _unfinished_prompt(view.table.rows, view.running)
    if slot < 0:
        return None
    rest = min(tokens_left(view.table.rows, slot), view.max_num_batched_tokens)
    return step_plan(np.array([slot], dtype=np.int64), np.array([rest], dtype=np.int64))


@njit(cache=True)
def _unfinished_prompt(rows: RequestArray, running: IntArray) -> int:
    """The first running request that has more to compute than its next token; -1 without one."""
    for slot in running:
        if tokens_left(rows, slot) > 1:
            return int(slot)
    return -1


def step_plan(
    slots: IntArray, tokens: IntArray, reason: Reason = Reason.STOCK_ORDER, drafts: IntArray | None = None
) -> StepPlan:
    """A plan that runs ``slots`` with ``tokens`` (``drafts`` counted in), all for one reason."""
    plan = StepPlan(slots=slots, tokens=tokens, reasons=np.full(len(slots), int(reason), dtype=np.int64))
    if drafts is not None:
        plan.draft_tokens = drafts
    return plan


def checked_draft_tokens(draft_tokens: int) -> int:
    """The fixed draft length of a policy.

    Raises:
        InvalidFieldError: out of range.
    """
    return int(check_number("draft_tokens", draft_tokens, low=0, high=MAX_DRAFT_TOKENS, low_included=True))
