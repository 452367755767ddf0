"""What kernels take of one plan: the engine's state in one tuple, and how to read a request's row.

``status`` is a copy of the table's column. A plan changes the copy; the table changes when the plan is committed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.core.plan import EngineView
from slos_serve.core.request import RequestArray, SlotArray, Status
from slos_serve.perf.jit import in_place

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

UNDECIDED, ADMITTED, BEST_EFFORT = int(Status.UNDECIDED), int(Status.ADMITTED), int(Status.BEST_EFFORT)
# Lead, in tokens, that a stage gains from the margin on its TPOT. A promise is about the mean of a stage, so a late
# step takes a part of one token however long the answer is.
AHEAD_TOKENS = 1.0
# Lead, in tokens, that a stage aims at from its first token on: nothing else evens out a step that is slow by itself.
FIRST_LEAD = 0.25


class State(NamedTuple):
    """An engine at the start of a step.

    Attributes:
        rows: the request table.
        status: int64 [rows], what the plan makes of each request's status.
        running, waiting: slots, as of :class:`slos_serve.core.plan.EngineView`.
        coefficients: float64 [8], batch times as they are planned: corrected, margin added.
        now_s: when the step starts.
        margin: share of every TPOT kept in hand.
        boost: float64 [NUM_SHARES], see :class:`slos_serve.perf.class_shares.ClassShares`.
        free_blocks .. plan_ahead: as of the view.
    """

    rows: RequestArray
    status: IntArray
    running: SlotArray
    waiting: SlotArray
    coefficients: FloatArray
    now_s: float
    margin: float
    boost: FloatArray
    free_blocks: int
    total_blocks: int
    block_size: int
    max_num_seqs: int
    max_tokens: int
    max_adapters: int
    chunk_multiple: int
    prefill_threshold: int
    plan_ahead: bool


def state_of(view: EngineView, now_s: float, coefficients: FloatArray, margin: float, boost: FloatArray) -> State:
    """The state of a view."""
    rows = view.table.rows
    return State(
        rows,
        rows["status"].copy(),
        view.running,
        view.waiting,
        coefficients,
        now_s,
        margin,
        boost,
        int(view.free_blocks),
        int(view.total_blocks),
        int(view.block_size),
        int(view.max_num_seqs),
        int(view.max_num_batched_tokens),
        int(view.max_adapters),
        max(int(view.chunk_multiple), 1),
        int(view.prefill_threshold),
        bool(view.plan_ahead),
    )


@njit(cache=True)
def without(state: State, slot: int) -> State:
    """The state once a running request has been preempted."""
    freed = held_blocks(state.rows, slot, state.block_size)
    return State(
        state.rows,
        state.status,
        state.running[state.running != slot],
        state.waiting,
        state.coefficients,
        state.now_s,
        state.margin,
        state.boost,
        state.free_blocks + freed,
        state.total_blocks,
        state.block_size,
        state.max_num_seqs,
        state.max_tokens,
        state.max_adapters,
        state.chunk_multiple,
        state.prefill_threshold,
        state.plan_ahead,
    )


@in_place
def weight_of(state: State, slot: int) -> float:
    """What admitting a request is worth: its own weight, more where its class or tenant is promised less."""
    return float(state.rows["weight"][slot] * state.boost[state.rows["share"][slot]])


@in_place
def blocks_for(tokens: int, block_size: int) -> int:
    """KV blocks that hold ``tokens``."""
    return (tokens + block_size - 1) // block_size


@in_place
def tokens_done(rows: RequestArray, slot: int) -> int:
    """Tokens that need not be computed: those with KV, and for a waiting request those that its prefix cache has."""
    done = rows["computed_tokens"][slot]
    return int(done if rows["running"][slot] == 1 else done + rows["cached_tokens"][slot])


@in_place
def tokens_left(rows: RequestArray, slot: int) -> int:
    """Tokens to compute before the next one can be sampled; 1 for a decode, 0 while the last token is in flight."""
    left = rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - tokens_done(rows, slot)
    if rows["running"][slot] == 0:
        return int(max(left, 1))
    return int(max(left, 0) if rows["output_tokens"][slot] < rows["max_tokens"][slot] else 0)


@in_place
def is_decode(rows: RequestArray, slot: int) -> bool:
    """Whether a running request has at most its next token to compute. A prompt that grew makes it a prefill again."""
    return bool(rows["running"][slot] == 1 and rows["output_tokens"][slot] > 0 and tokens_left(rows, slot) <= 1)


@in_place
def held_blocks(rows: RequestArray, slot: int, block_size: int) -> int:
    """KV blocks that a running request gives back when it is preempted."""
    return int(blocks_for(rows["computed_tokens"][slot], block_size) + rows["fixed_blocks"][slot])


@in_place
def blocks_needed(rows: RequestArray, slot: int, tokens: int, block_size: int) -> int:
    """KV blocks that ``tokens`` more take of the free ones; a request that starts also takes its fixed blocks."""
    computed = rows["computed_tokens"][slot]
    needed = blocks_for(tokens_done(rows, slot) + tokens, block_size) - blocks_for(computed, block_size)
    starts_empty = rows["running"][slot] == 0 and computed == 0
    return int(needed + (rows["fixed_blocks"][slot] if starts_empty else 0))


@in_place
def peak_blocks(rows: RequestArray, slot: int, block_size: int) -> int:
    """Blocks a request holds when its forecast last token comes."""
    tokens = rows["prompt_tokens"][slot] + max(rows["expected_tokens"][slot], rows["output_tokens"][slot])
    return int(blocks_for(tokens, block_size) + rows["fixed_blocks"][slot])


@in_place
def step_pace_s(rows: RequestArray, slot: int) -> float:
    """The pace of a request that steps are cut short for."""
    return float(rows["step_pace_s"][slot] if rows["answer_due_s"][slot] < np.inf else rows["tpot_s"][slot])


@in_place
def next_due_s(rows: RequestArray, slot: int, margin: float) -> float:
    """When the next token is due: the first by the TTFT, token k of a stage by its start + k * TPOT.

    A stage aims at ``FIRST_LEAD``, and at ``margin`` for each of its tokens once that is more, up to ``AHEAD_TOKENS``.
    Nobody promises when a later stage begins: its first token gets the pace of those that follow. The pace that the
    deadline of an answer asks for changes with every plan, so each token is due that pace after the one before,
    however late or early that was (:mod:`slos_serve.planning.deadlines`). A TPOT promised beside it holds as well.
    """
    if rows["output_tokens"][slot] == 0:
        return float(rows["ttft_due_s"][slot])
    has_deadline = rows["answer_due_s"][slot] < np.inf
    tpot_s = rows["promised_tpot_s"][slot] if has_deadline else rows["tpot_s"][slot]
    gap_s, stage_tokens = rows["max_stall_s"][slot], rows["stage_tokens"][slot]
    if stage_tokens == 0:
        paced_s = rows["last_token_s"][slot] + tpot_s * (1.0 - FIRST_LEAD)
    else:
        lead = min(max(stage_tokens * margin, FIRST_LEAD), AHEAD_TOKENS)
        paced_s = rows["stage_start_s"][slot] + tpot_s * (stage_tokens - lead)
    if has_deadline:
        gap_s = min(gap_s, rows["step_pace_s"][slot])
    return float(min(paced_s, rows["last_token_s"][slot] + gap_s))
