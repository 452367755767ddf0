"""Compile all kernels (or load them from their cache) before the first request has to wait for it."""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView
from slos_serve.core.request import RequestTable, SlotArray, Status
from slos_serve.planning.planner import Planner
from slos_serve.vllm_plugin import row_kernels


def warm_up(planner: Planner) -> None:
    """Plan a few steps of an imaginary engine that take every branch: admission, holding, best effort."""
    table = RequestTable(8)
    running = []
    for tokens, status in ((5, Status.ADMITTED), (5, Status.BEST_EFFORT), (0, Status.ADMITTED)):
        slot = table.add(arrival_s=0.0, prompt_tokens=40, max_tokens=64, ttft_due_s=10.0, tpot_s=0.1, max_stall_s=2.0)
        row = table.rows[slot]
        row["running"], row["status"] = 1, status
        row["output_tokens"] = row["stage_tokens"] = tokens
        row["computed_tokens"] = 40 + tokens - 1 if tokens else 16
        row["stage_start_s"] = row["last_token_s"] = 0.5
        running.append(slot)
    waiting = [
        table.add(arrival_s=0.9, prompt_tokens=2000, max_tokens=64, ttft_due_s=due_s, tpot_s=tpot_s, max_stall_s=2.0)
        for due_s, tpot_s in ((1.5, 0.1), (1.6, 0.2), (1.7, 0.1), (np.inf, 0.2), (np.inf, np.inf))
    ]
    table.rows["answer_due_s"][waiting[-1]] = 20.0
    for free_blocks in (1000, 0):
        view = EngineView(
            table=table,
            running=np.array(running, dtype=np.int64),
            waiting=np.array(waiting, dtype=np.int64),
            free_blocks=free_blocks,
            total_blocks=1000,
            block_size=16,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
        )
        planner.commit(planner.plan(1.0, view), view, view.running)
    _warm_up_rows(table, np.array(running, dtype=np.int64))


def _warm_up_rows(table: RequestTable, slots: SlotArray) -> None:
    """The kernels that keep rows up to date."""
    rows, none = table.rows, np.empty(0, dtype=np.int64)
    ends, there = np.full(len(rows), 1000, dtype=np.int64), np.ones(len(rows), dtype=np.bool_)
    row_kernels.advance_rows(rows, slots, np.zeros(len(rows), dtype=np.int64), ends, 1.0)
    row_kernels.note_pending(rows, slots, 1.0)
    row_kernels.sort_out(rows, slots, there, there, none, none)
    row_kernels.batch_sums(rows, slots, np.ones(len(slots), dtype=np.int64), none, none)
