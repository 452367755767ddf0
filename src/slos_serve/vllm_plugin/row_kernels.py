"""What is done for each running request in each step, compiled: a numpy call for each column takes ten times as long.

Columns are those of the planner's table and of :class:`slos_serve.vllm_plugin.progress.Progress`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.jit import in_place

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
# What is wrong with a plan's slots.
RIGHT, OUT_OF_RANGE, TWICE, EMPTY, WAITS = range(5)


@njit(cache=True)
def advance_rows(
    rows: RequestArray, slots: SlotArray, stage_offsets: IntArray, ends: IntArray, pending_first_s: float
) -> SlotArray:
    """Bring rows of running requests up to date from their computed tokens; returns positions of those near their end.

    Once all tokens of a request are computed, one more is in flight.

    Args:
        stage_offsets, ends: int64 [rows].
        pending_first_s: when a first token that is in flight will come.
    """
    near, count = np.empty(len(slots), dtype=np.int64), 0
    for at in range(len(slots)):
        slot = slots[at]
        computed = rows["computed_tokens"][slot]
        outputs = max(rows["output_tokens"][slot], computed + 1 - rows["prompt_tokens"][slot])
        rows["output_tokens"][slot] = outputs
        rows["stage_tokens"][slot] = outputs - stage_offsets[slot]
        rows["blocked"][slot] = 0
        if computed + 1 >= ends[slot]:
            near[count] = at
            count += 1
    note_pending(rows, slots, pending_first_s)
    return near[:count]


@in_place
def note_pending(rows: RequestArray, slots: SlotArray, pending_first_s: float) -> None:
    """Write when the first token of a stage will come that is in flight."""
    for slot in slots:
        if np.isnan(rows["stage_start_s"][slot]) and rows["stage_tokens"][slot] > 0:
            rows["stage_start_s"][slot] = rows["last_token_s"][slot] = pending_first_s


@njit(cache=True)
def sort_out(
    rows: RequestArray,
    slots: SlotArray,
    taken: BoolArray,
    listed: BoolArray,
    sessions: SlotArray,
    preempted: SlotArray,
) -> tuple[int, SlotArray, SlotArray]:
    """Check a plan's slots: what is wrong with them, positions of those that run now, and of those that start.

    Args:
        taken, listed: bool [rows].
        sessions: slots of sessions that wait for a turn: they start.
        preempted: slots that give their KV back: they do neither.
    """
    runs, starts = np.empty(len(slots), dtype=np.int64), np.empty(len(slots), dtype=np.int64)
    num_runs, num_starts, fault = 0, 0, RIGHT
    seen, gone, waits = np.zeros((3, len(taken)), dtype=np.bool_)
    for slot in preempted:
        gone[slot] = True
    for slot in sessions:
        waits[slot] = True
    for at in range(len(slots)):
        slot = slots[at]
        if slot < 0 or slot >= len(taken):
            return OUT_OF_RANGE, runs[:0], starts[:0]
        if seen[slot]:
            return TWICE, runs[:0], starts[:0]
        if not taken[slot]:
            return EMPTY, runs[:0], starts[:0]
        seen[slot] = True
        if rows["running"][slot] != 1 or waits[slot]:
            starts[num_starts] = at
            num_starts += 1
        elif rows["blocked"][slot] == 0 and not gone[slot]:
            if not listed[slot]:
                fault = WAITS
            runs[num_runs] = at
            num_runs += 1
    return fault, runs[:num_runs], starts[:num_starts]


@in_place
def batch_sums(
    rows: RequestArray, slots: SlotArray, tokens: IntArray, drafted: IntArray, done: IntArray
) -> tuple[int, int, int]:
    """New tokens, context tokens and attention units of a batch; see :class:`slos_serve.perf.batch_time.BatchShape`.

    Args:
        slots, tokens: int64 [n], of the batch.
        drafted: int64 [n], drafts among the tokens; empty without any.
        done: int64 [n], tokens with KV before the batch; empty: the rows say so, and are moved on by the batch.
    """
    total, context, units = 0, 0, 0
    for at in range(len(slots)):
        count = tokens[at]
        before = done[at] if len(done) > 0 else rows["computed_tokens"][slots[at]]
        if len(done) == 0:
            rows["computed_tokens"][slots[at]] = before + count
        total += count
        context += before
        if count > 1 and (len(drafted) == 0 or drafted[at] == 0):
            units += count * (count + 2 * before)
    return total, context, units
