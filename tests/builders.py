"""Short ways to build what tests need: engines with requests in them, batch-time models."""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.request import RequestTable, Status
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from slos_serve.planning.state import State, state_of

# OPT-13B on one A100-80G, seconds (DistServe's profile, read as in docs/batch-time-model.md).
OPT_13B_A100 = BatchTimeModel(0.11e-3, 8e-3, 0.0385e-3, 19.9e-3, 6.3e-7, 7.1e-9)


class EngineBuilder:
    """An engine's view, request by request; ``now_s`` is 100."""

    now_s = 100.0

    def __init__(self, *, total_blocks: int = 4000, block_size: int = 16, max_num_seqs: int = 256) -> None:
        self.table = RequestTable()
        self.running: list[int] = []
        self.waiting: list[int] = []
        self.total_blocks, self.block_size, self.max_num_seqs = total_blocks, block_size, max_num_seqs

    def wait(
        self,
        prompt_tokens: int = 200,
        *,
        due_in_s: float = 1.0,
        tpot_s: float = 0.1,
        max_tokens: int = 100,
        weight: float = 1.0,
        waited_s: float = 0.0,
        class_index: int = 0,
    ) -> int:
        """A request that waits."""
        slot = self.table.add(
            arrival_s=self.now_s - waited_s,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            ttft_due_s=self.now_s + due_in_s,
            tpot_s=tpot_s,
            weight=weight,
            class_index=class_index,
            max_stall_s=2.0,
        )
        self.waiting.append(slot)
        return slot

    def decode(
        self,
        *,
        prompt_tokens: int = 200,
        output_tokens: int = 10,
        tpot_s: float = 0.1,
        ahead_s: float = 0.0,
        max_tokens: int = 100,
        status: Status = Status.ADMITTED,
    ) -> int:
        """A running decode whose next token, with the default margin of 5 %, is due ``ahead_s`` from now."""
        slot = self.table.add(
            arrival_s=self.now_s - 10.0,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            ttft_due_s=self.now_s - 9.0,
            tpot_s=tpot_s,
            max_stall_s=2.0,
        )
        row = self.table.rows[slot]
        row["running"], row["status"] = 1, status
        row["output_tokens"] = row["stage_tokens"] = output_tokens
        row["computed_tokens"] = prompt_tokens + output_tokens - 1
        paced_s = (output_tokens - min(0.05 * output_tokens, 1.0)) * tpot_s if np.isfinite(tpot_s) else 0.0
        row["stage_start_s"] = self.now_s + ahead_s - paced_s
        row["last_token_s"] = self.now_s - 0.03
        self.running.append(slot)
        return slot

    def prefilling(self, prompt_tokens: int, done_tokens: int, *, due_in_s: float = 1.0, tpot_s: float = 0.1) -> int:
        """A running request, promised, in the middle of its prompt."""
        slot = self.wait(prompt_tokens, due_in_s=due_in_s, tpot_s=tpot_s)
        self.waiting.remove(slot)
        row = self.table.rows[slot]
        row["running"], row["status"], row["computed_tokens"] = 1, Status.ADMITTED, done_tokens
        self.running.append(slot)
        return slot

    def best_effort(self, prompt_tokens: int = 200) -> int:
        """A waiting request without a promise."""
        return self.wait(prompt_tokens, due_in_s=np.inf, tpot_s=np.inf)

    def view(self, *, free_blocks: int | None = None, max_num_batched_tokens: int = 2048) -> EngineView:
        """What a policy sees."""
        rows = self.table.rows
        held = sum(-(-int(rows["computed_tokens"][slot]) // self.block_size) for slot in self.running)
        return EngineView(
            table=self.table,
            running=np.array(self.running, dtype=np.int64),
            waiting=np.array(self.waiting, dtype=np.int64),
            free_blocks=self.total_blocks - held if free_blocks is None else free_blocks,
            total_blocks=self.total_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    def state(self, *, free_blocks: int | None = None, model: BatchTimeModel = OPT_13B_A100) -> State:
        """What the planner's kernels see."""
        return state_of(self.view(free_blocks=free_blocks), self.now_s, model.coefficients, 0.05, np.ones(8))


def carried_out(planner: Planner, now_s: float, view: EngineView) -> StepPlan:
    """A plan that was made and ran."""
    plan = planner.plan(now_s, view)
    planner.commit(plan, view, plan.slots)
    return plan


def planned(
    engine: EngineBuilder, settings: PlannerSettings | None = None, *, free_blocks: int | None = None
) -> StepPlan:
    """A new planner's first plan of an engine, carried out."""
    return carried_out(Planner(OPT_13B_A100, 2, settings), engine.now_s, engine.view(free_blocks=free_blocks))


def reason_of(plan: StepPlan, slot: int) -> Reason | None:
    """Why a slot runs in a plan; ``None`` where it does not."""
    where = np.flatnonzero(plan.slots == slot)
    return Reason(int(plan.reasons[where[0]])) if len(where) else None
