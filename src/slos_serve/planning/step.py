"""The batch being formed: what is in it, the seconds, tokens, blocks and seats it takes, and who gave way for it.

A :class:`Step` is a tuple of arrays that its functions change in place. Each function is a kind of request's way into
the batch. A batch can be followed by order and budget alone: each request gets all that it has left, but for the last.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.plan import Reason
from slos_serve.core.request import SlotArray
from slos_serve.perf.formula import K_S, K_SEQ
from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import batch_s, decode_s, largest_chunk, request_s
from slos_serve.planning.state import (
    BoolArray,
    FloatArray,
    IntArray,
    State,
    blocks_needed,
    held_blocks,
    tokens_done,
    tokens_left,
)

NO_ROOM, NO_MEMORY = int(Reason.NO_ROOM), int(Reason.NO_MEMORY)
# Positions in Step.sums and Step.counts.
TOKENS, REQUESTS_S, DRAFT_STEPS = range(3)
FREE, SEATS, ENTRIES, HELD, PREEMPTED, CUT, STARTED, ADAPTERS, CHUNKS = range(9)
# No prefill chunk is smaller, unless it is the last one of its prompt: each chunk costs a request's fixed time.
MIN_CHUNK_TOKENS = 16


class Step(NamedTuple):
    """A batch.

    Attributes:
        state: the engine.
        sums: float64 [3], tokens, seconds of the requests beside the roofline part, longest draft.
        counts: int64 [9], free KV blocks, running requests, entries, held, preempted, whether a chunk was cut (then
            nothing follows it), whether a waiting request started, distinct adapters, prefill chunks.
        entries: int64 [4, most], slots, tokens, reasons and drafts of the requests that run.
        held: int64 [2, running], slots and reasons of running requests that do not.
        victims: int64, who may be preempted, the first to go first.
        gone: bool [rows], who was.
        adapters: int64 [2, most], each adapter and how many running requests use it.
    """

    state: State
    sums: FloatArray
    counts: IntArray
    entries: IntArray
    held: IntArray
    victims: SlotArray
    gone: BoolArray
    adapters: IntArray


@njit(cache=True)
def empty_step(state: State, most: int, victims: SlotArray) -> Step:
    """A batch with room for ``most`` entries."""
    counts = np.zeros(9, dtype=np.int64)
    counts[FREE], counts[SEATS] = state.free_blocks, len(state.running)
    step = Step(
        state,
        np.zeros(3),
        counts,
        np.empty((4, most), dtype=np.int64),
        np.empty((2, len(state.running)), dtype=np.int64),
        victims,
        np.zeros(len(state.rows), dtype=np.bool_),
        np.zeros((2, most if state.max_adapters > 0 else 0), dtype=np.int64),
    )
    for slot in state.running:
        use_adapter(step, slot, 1)
    return step


@in_place
def use_adapter(step: Step, slot: int, more: int) -> None:
    """Count a running request in or out (``more`` 1 or -1) of its adapter's users."""
    own = step.state.rows["adapter"][slot]
    if step.state.max_adapters <= 0 or own == 0:
        return
    for j in range(step.counts[ADAPTERS]):
        if step.adapters[0, j] == own:
            step.adapters[1, j] += more
            return
    at = step.counts[ADAPTERS]
    step.adapters[0, at], step.adapters[1, at] = own, more
    step.counts[ADAPTERS] = at + 1


@in_place
def lacks_adapter(step: Step, slot: int, preempted: int) -> bool:
    """Whether a start would be one adapter too many once the first ``preempted`` victims are gone."""
    own = step.state.rows["adapter"][slot]
    if step.state.max_adapters <= 0 or own == 0:
        return False
    distinct = 0
    for j in range(step.counts[ADAPTERS]):
        users = step.adapters[1, j]
        for at in range(step.counts[PREEMPTED], preempted):
            users -= 1 if step.state.rows["adapter"][step.victims[at]] == step.adapters[0, j] else 0
        if users > 0 and step.adapters[0, j] == own:
            return False
        distinct += 1 if users > 0 else 0
    return bool(distinct >= step.state.max_adapters)


@in_place
def make_room(step: Step, slot: int, tokens: int) -> bool:
    """Give a request KV blocks for ``tokens`` more, a seat and an adapter, from victims where none are free.

    Victims are counted first and preempted only when they suffice.
    """
    state, counts, victims = step.state, step.counts, step.victims
    starts = state.rows["running"][slot] == 0
    missing = blocks_needed(state.rows, slot, tokens, state.block_size) - counts[FREE]
    seats, last = counts[SEATS], counts[PREEMPTED]
    while missing > 0 or (starts and (seats >= state.max_num_seqs or lacks_adapter(step, slot, last))):
        if last >= len(victims):
            return False
        missing -= held_blocks(state.rows, victims[last], state.block_size)
        seats -= 1
        last += 1
    for at in range(counts[PREEMPTED], last):
        counts[FREE] += held_blocks(state.rows, victims[at], state.block_size)
        step.gone[victims[at]] = True
        use_adapter(step, victims[at], -1)
    counts[SEATS], counts[PREEMPTED] = seats, last
    return True


@in_place
def has_room(step: Step, slot: int, tokens: int) -> bool:
    """Whether a request gets blocks for ``tokens`` more, a seat and an adapter with nobody giving way."""
    state, counts = step.state, step.counts
    if blocks_needed(state.rows, slot, tokens, state.block_size) > counts[FREE]:
        return False
    starts = state.rows["running"][slot] == 0
    return not (starts and (counts[SEATS] >= state.max_num_seqs or lacks_adapter(step, slot, counts[PREEMPTED])))


@in_place
def seconds(step: Step) -> float:
    """Predicted seconds of the batch so far."""
    return batch_s(step.state.coefficients, step.sums[TOKENS], step.sums[REQUESTS_S], step.sums[DRAFT_STEPS])


@in_place
def seconds_with(step: Step, slot: int, draft: int) -> float:
    """Predicted seconds with one more decode that verifies ``draft`` drafts."""
    own_s = decode_s(step.state.coefficients, draft, step.state.rows["computed_tokens"][slot])
    tokens, longest = step.sums[TOKENS] + 1.0 + draft, max(step.sums[DRAFT_STEPS], float(draft))
    return batch_s(step.state.coefficients, tokens, step.sums[REQUESTS_S] + own_s, longest)


@in_place
def chunk_within(step: Step, slot: int, limit_s: float) -> tuple[int, bool]:
    """Most tokens of a request with which the batch ends by ``limit_s``, and whether it could do with more.

    0 when a chunk was cut already, or when the chunk would be tiny or would have to stand behind a request that starts.
    A chunk that does not end its prompt ends at a multiple of what the engine asks for.
    """
    state, counts, sums = step.state, step.counts, step.sums
    if counts[CUT] == 1:
        return 0, True
    rows, multiple = state.rows, state.chunk_multiple
    left, done = tokens_left(rows, slot), tokens_done(rows, slot)
    most = min(left, state.prefill_threshold) if state.prefill_threshold > 0 else left
    room_s = limit_s - sums[REQUESTS_S] - state.coefficients[K_S] * sums[DRAFT_STEPS]
    chunk = int(min(most, state.max_tokens - sums[TOKENS]))
    if chunk > 0:
        chunk = int(min(chunk, largest_chunk(state.coefficients, room_s, sums[TOKENS], done)))
    if most < left:
        most = (done + most) // multiple * multiple - done
    if chunk < left:
        chunk = (done + chunk) // multiple * multiple - done
    cut = chunk < most
    behind_a_start = rows["running"][slot] == 1 and counts[STARTED] == 1
    piece = min(left, multiple - done % multiple)
    if chunk <= 0 and multiple > 1 and counts[CHUNKS] == 0 and piece <= state.max_tokens - sums[TOKENS]:
        # The engine cuts no smaller: the first piece runs though it outlasts the step, or it never would.
        return (0, True) if behind_a_start and piece < left else (piece, True)
    if chunk <= 0 or (cut and (chunk < MIN_CHUNK_TOKENS or behind_a_start)):
        return 0, True
    return chunk, cut


@in_place
def run(step: Step, slot: int, tokens: int, draft: int, reason: int) -> None:
    """Put a request with ``tokens`` new tokens, ``draft`` of them drafts, into the batch."""
    state, counts, sums = step.state, step.counts, step.sums
    done = tokens_done(state.rows, slot)
    counts[FREE] -= blocks_needed(state.rows, slot, tokens, state.block_size)
    if state.rows["running"][slot] == 0:
        counts[SEATS] += 1
        counts[STARTED] = 1
        use_adapter(step, slot, 1)
    sums[TOKENS] += tokens
    sums[REQUESTS_S] += request_s(state.coefficients, float(tokens - draft), float(done))
    sums[REQUESTS_S] += state.coefficients[K_SEQ] * draft
    sums[DRAFT_STEPS] = max(sums[DRAFT_STEPS], float(draft))
    at = counts[ENTRIES]
    step.entries[0, at], step.entries[1, at] = slot, tokens
    step.entries[2, at], step.entries[3, at] = reason, draft
    counts[ENTRIES] = at + 1


@in_place
def run_chunk(step: Step, slot: int, chunk: int, cut: bool, reason: int) -> None:
    """Put what :func:`chunk_within` found into the batch."""
    run(step, slot, chunk, 0, reason)
    step.counts[CHUNKS] += chunk > 1
    step.counts[CUT] = 1 if cut else 0


@in_place
def run_decode(step: Step, slot: int, draft: int, reason: int) -> bool:
    """Put a decode into the batch, without its drafts where they do not fit; False when it finds no room itself."""
    state = step.state
    if step.sums[TOKENS] + 1 > state.max_tokens:
        hold(step, slot, NO_ROOM)
        return False
    if not make_room(step, slot, 1):
        hold(step, slot, NO_MEMORY)
        return False
    if step.sums[TOKENS] + 1 + draft > state.max_tokens or not has_room(step, slot, 1 + draft):
        draft = 0
    run(step, slot, 1 + draft, draft, reason)
    return True


@in_place
def hold(step: Step, slot: int, reason: int) -> None:
    """Leave a running request out of the batch."""
    at = step.counts[HELD]
    step.held[0, at], step.held[1, at] = slot, reason
    step.counts[HELD] = at + 1
