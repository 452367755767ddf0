"""How engines fill a batch, as kernels: chunked in queue order, whole prompts first, decodes then ordered prompts.

Shared by the baselines; each policy's own file says which one it is and what it changes. Memory rules are the engine's:
a waiting request starts only when its whole prompt fits in the free blocks. In queue order nothing may pass it.

Every kernel writes a batch into ``out``, int64 [3, n]: slots, tokens (drafts counted in), drafts. It returns the number
of entries; there is room for every running and every waiting request (:func:`room_for`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.request import MAX_DRAFT_TOKENS, RequestArray
from slos_serve.core.slo import check_number
from slos_serve.perf.jit import in_place

IntArray = NDArray[np.int64]


class Room(NamedTuple):
    """What a batch may take.

    Attributes:
        tokens: new tokens.
        seqs: requests that hold KV.
        blocks: free KV blocks.
        block_size: tokens a block.
        reserve_blocks: blocks that stay free when a waiting request starts (the watermark).
    """

    tokens: int
    seqs: int
    blocks: int
    block_size: int
    reserve_blocks: int


def room_of(view: EngineView, token_budget: int, watermark: float = 0.0) -> Room:
    """The room of a step. ``watermark``: share of all blocks kept free while anything runs."""
    return Room(
        tokens=min(token_budget, view.max_num_batched_tokens),
        seqs=view.max_num_seqs,
        blocks=view.free_blocks,
        block_size=view.block_size,
        reserve_blocks=int(watermark * view.total_blocks) if len(view.running) else 0,
    )


def room_for(view: EngineView) -> IntArray:
    """An ``out`` for every request of the view."""
    return np.empty((3, len(view.running) + len(view.waiting)), dtype=np.int64)


@in_place
def tokens_left(rows: RequestArray, slot: int) -> int:
    """Tokens to compute before the next output token; 1 for a decode. A cached prefix counts as computed."""
    done = rows["computed_tokens"][slot] + (0 if rows["running"][slot] else rows["cached_tokens"][slot])
    return int(rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - done)


@in_place
def blocks_of(tokens: int, block_size: int) -> int:
    """Whole blocks that hold ``tokens``."""
    return (tokens + block_size - 1) // block_size


@in_place
def blocks_to_start(rows: RequestArray, slot: int, tokens: int, block_size: int) -> int:
    """Blocks that a waiting request takes with its first ``tokens``; cached ones that others hold cost nothing."""
    return int(blocks_of(tokens, block_size) + rows["fixed_blocks"][slot])


@in_place
def drafts_for(rows: RequestArray, slot: int, draft_tokens: int, token_budget: int) -> int:
    """Drafts that a running decode verifies when all decodes draft ``draft_tokens``: 0 for a prefill.

    Fewer when the step's budget or what the request may still generate leaves no more.
    """
    if rows["output_tokens"][slot] == 0 or tokens_left(rows, slot) != 1:
        return 0
    left = rows["max_tokens"][slot] - rows["output_tokens"][slot] - 1
    return int(max(min(draft_tokens, left, token_budget - 1), 0))


@njit(cache=True)
def draft_all(rows: RequestArray, decodes: IntArray, draft_tokens: int, room: Room) -> IntArray:
    """int64 [n]: drafts of a step of ``decodes`` alone, in their order, each at least left its own token and block."""
    drafts = np.zeros(len(decodes), dtype=np.int64)
    if draft_tokens == 0:
        return drafts
    token_budget, free_blocks, block_size = room.tokens - len(decodes), room.blocks, room.block_size
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


@in_place
def chunked(
    rows: RequestArray, running: IntArray, waiting: IntArray, room: Room, draft_tokens: int, out: IntArray
) -> int:
    """Running requests in their order, then waiting ones, each with as much as the token budget leaves.

    Decodes verify ``draft_tokens`` drafts each.
    """
    count = 0
    token_budget, free_blocks, block_size = room.tokens, room.blocks, room.block_size
    for slot in running:
        if token_budget <= 0:
            break
        draft = drafts_for(rows, slot, draft_tokens, token_budget) if draft_tokens > 0 else 0
        chunk = min(tokens_left(rows, slot) + draft, token_budget)
        done = rows["computed_tokens"][slot]
        free_blocks -= blocks_of(done + chunk, block_size) - blocks_of(done, block_size)
        out[0, count], out[1, count], out[2, count] = slot, chunk, draft
        token_budget -= chunk
        count += 1
    num_running = len(running)
    for slot in waiting:
        whole = blocks_to_start(rows, slot, rows["prompt_tokens"][slot] + rows["output_tokens"][slot], block_size)
        if token_budget <= 0 or num_running >= room.seqs or whole + room.reserve_blocks > free_blocks:
            break
        chunk = min(tokens_left(rows, slot), token_budget)
        free_blocks -= blocks_to_start(rows, slot, rows["cached_tokens"][slot] + chunk, block_size)
        out[0, count], out[1, count], out[2, count] = slot, chunk, 0
        token_budget -= chunk
        num_running += 1
        count += 1
    return count


@in_place
def whole_prompts(
    rows: RequestArray, waiting: IntArray, num_running: int, room: Room, most_tokens: int, out: IntArray
) -> int:
    """Waiting requests in order, each with its whole prompt, while they fit.

    The first prompt may exceed the budget: an engine without chunks has to run it in one batch, or in as few of
    ``most_tokens`` as it takes.
    """
    count = 0
    total = 0
    free_blocks = room.blocks
    for slot in waiting:
        left = min(tokens_left(rows, slot), most_tokens)
        need = blocks_to_start(rows, slot, rows["prompt_tokens"][slot] + rows["output_tokens"][slot], room.block_size)
        full = num_running >= room.seqs or need + room.reserve_blocks > free_blocks
        if full or (count and total + left > room.tokens):
            break
        out[0, count], out[1, count], out[2, count] = slot, left, 0
        free_blocks -= need
        total += left
        num_running += 1
        count += 1
        if left < tokens_left(rows, slot):
            break
    return count


@njit(cache=True)
def decodes_then(
    rows: RequestArray, running: IntArray, ordered: IntArray, room: Room, draft_tokens: int, out: IntArray
) -> int:
    """Decodes of ``running``, then prompts of ``ordered`` (running and waiting ones) as far as the tokens go.

    A waiting prompt starts only when it fits beside what the prompts under way still need, so that prompts do not
    preempt each other; where it does not fit, the next one may. Running requests stand before starting ones in ``out``.
    """
    count = 0
    token_budget, free_blocks, block_size = room.tokens, room.blocks, room.block_size
    owed = 0
    for slot in running:
        done = rows["computed_tokens"][slot]
        if tokens_left(rows, slot) > 1:
            owed += blocks_of(done + tokens_left(rows, slot), block_size) - blocks_of(done, block_size)
        elif token_budget > 0:
            draft = drafts_for(rows, slot, draft_tokens, token_budget) if draft_tokens > 0 else 0
            free_blocks -= blocks_of(done + 1 + draft, block_size) - blocks_of(done, block_size)
            out[0, count], out[1, count], out[2, count] = slot, 1 + draft, draft
            token_budget -= 1 + draft
            count += 1
    num_running = len(running)
    starting = np.empty((2, len(ordered)), dtype=np.int64)
    num_starting = 0
    for slot in ordered:
        if token_budget <= 0:
            break
        chunk = min(tokens_left(rows, slot), token_budget)
        if rows["running"][slot] == 0:
            whole = blocks_to_start(rows, slot, rows["prompt_tokens"][slot] + rows["output_tokens"][slot], block_size)
            if num_running >= room.seqs or whole + room.reserve_blocks > free_blocks - owed:
                continue
            num_running += 1
            owed += whole
            starting[0, num_starting], starting[1, num_starting] = slot, chunk
            num_starting += 1
        elif tokens_left(rows, slot) > 1:
            out[0, count], out[1, count], out[2, count] = slot, chunk, 0
            count += 1
        else:
            continue
        token_budget -= chunk
    for i in range(num_starting):
        out[0, count], out[1, count], out[2, count] = starting[0, i], starting[1, i], 0
        count += 1
    return count


def tokens_done_of(rows: RequestArray, slots: IntArray) -> IntArray:
    """int64 [n]: tokens with KV, a cached prefix counted."""
    running = rows["running"][slots] == 1
    return np.asarray(np.where(running, rows["computed_tokens"][slots], rows["cached_tokens"][slots]))


def tokens_left_of(rows: RequestArray, slots: IntArray) -> IntArray:
    """int64 [n]: :func:`tokens_left` of each."""
    return np.asarray(rows["prompt_tokens"][slots] + rows["output_tokens"][slots] - tokens_done_of(rows, slots))


def rest_of_prompt(view: EngineView) -> StepPlan | None:
    """For engines without chunks: a step that goes on with what was longer than any batch, ``None`` without such.

    A prompt, or what a request has to compute again after a preemption.
    """
    slot = _unfinished_prompt(view.table.rows, view.running)
    if slot < 0:
        return None
    rest = min(tokens_left(view.table.rows, slot), view.max_num_batched_tokens)
    return batch_plan(np.array([[slot], [rest], [0]], dtype=np.int64), 1)


@in_place
def _unfinished_prompt(rows: RequestArray, running: IntArray) -> int:
    """The first running request that has more to compute than its next token; -1 without one."""
    for slot in running:
        if tokens_left(rows, slot) > 1:
            return int(slot)
    return -1


def batch_plan(out: IntArray, count: int, reason: Reason = Reason.STOCK_ORDER) -> StepPlan:
    """A plan of the first ``count`` entries of ``out``, all for one reason."""
    slots, tokens, drafts = out[:, :count]
    reasons = np.full(count, int(reason), dtype=np.int64)
    return StepPlan(slots=slots, tokens=tokens, reasons=reasons, draft_tokens=drafts)


def checked_draft_tokens(draft_tokens: int) -> int:
    """The fixed draft length of a policy.

    Raises:
        InvalidFieldError: out of range.
    """
    return int(check_number("draft_tokens", draft_tokens, low=0, high=MAX_DRAFT_TOKENS, low_included=True))


def checked_tokens(name: str, tokens: float) -> int:
    """A token budget.

    Raises:
        InvalidFieldError: out of range, or not a whole number.
    """
    if check_number(name, tokens, low=1, high=1e6, low_included=True) % 1:
        raise InvalidFieldError(name, tokens, "a whole number")
    return int(tokens)


def checked_watermark(watermark: float) -> float:
    """A share of the blocks.

    Raises:
        InvalidFieldError: out of range.
    """
    return check_number("watermark", watermark, low=0.0, high=0.9, low_included=True)
