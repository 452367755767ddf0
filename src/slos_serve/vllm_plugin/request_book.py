"""The plug-in's book of requests: vLLM's request objects mirrored into the planner's table.

Progress is read from vLLM's own counters before every plan, so nothing that vLLM does by itself (preemption, abort,
stale output) can leave the table behind. Only times are kept by us: when tokens came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import RequestTable, SlotArray, Status
from slos_serve.core.slo import SLOClass
from slos_serve.perf.batch_time import BatchShape
from slos_serve.vllm_plugin import compat

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.request import Request


@dataclass(slots=True)
class Tracked:
    """One request's promise and what became of it.

    Attributes:
        slot: its row in the table.
        slo_class: promise, ``None`` without one.
        was_admitted: whether its promise was ever made.
        reason: why it is best effort, when it is.
        planned_preemptions: preemptions that a plan asked for.
        stage: index of the current stage.
        stage_offset: output tokens that came before the current stage.
        first_token_s: when its first token came, ``None`` before.
        stages_ok: False once a finished stage missed its TPOT.
        drafts_in_flight: drafts in steps whose tokens have not come yet.
    """

    request: Request
    slot: int
    slo_class: SLOClass | None
    arrival_s: float
    ttft_due_s: float
    was_admitted: bool = False
    reason: str = ""
    planned_preemptions: int = 0
    stage: int = 0
    stage_offset: int = 0
    stage_start_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    seen_tokens: int = 0
    stages_ok: bool = True
    drafts_in_flight: int = 0


class RequestBook:
    """Every unfinished request of one engine."""

    def __init__(self) -> None:
        self.table = RequestTable()
        self.by_id: dict[str, Tracked] = {}
        self.by_slot: dict[int, Tracked] = {}
        self.num_slo = 0

    def add(
        self,
        request: Request,
        slo_class: SLOClass | None,
        *,
        class_index: int,
        arrival_s: float,
        ttft_due_s: float,
        margin_s: float,
        hint_tokens: int,
        max_tokens: int,
    ) -> Tracked:
        """Enter a new request; it is planned for ``margin_s`` before its promise is due."""
        slot = self.table.add(
            arrival_s=arrival_s,
            prompt_tokens=request.num_prompt_tokens,
            max_tokens=max_tokens,
            ttft_due_s=ttft_due_s - margin_s,
            tpot_s=slo_class.slo.tpot_s if slo_class else np.inf,
            class_index=class_index,
            weight=max(slo_class.weight, 1e-6) if slo_class else 1.0,
            max_stall_s=slo_class.max_stall_ms / 1000.0 if slo_class else np.inf,
            hint_tokens=hint_tokens,
        )
        tracked = Tracked(request, slot, slo_class, arrival_s, ttft_due_s)
        self.by_id[request.request_id] = tracked
        self.by_slot[slot] = tracked
        self.num_slo += slo_class is not None
        return tracked

    def remove(self, request_id: str) -> Tracked | None:
        """Forget a finished request; ``None`` if it was not known."""
        tracked = self.by_id.pop(request_id, None)
        if tracked is not None:
            del self.by_slot[tracked.slot]
            self.table.remove(tracked.slot)
            self.num_slo -= tracked.slo_class is not None
        return tracked

    def status(self, tracked: Tracked) -> Status:
        """Where its promise stands."""
        return Status(int(self.table.rows["status"][tracked.slot]))

    def view(self, scheduler: AsyncScheduler, pending_first_s: float) -> EngineView:
        """Bring the table up to date with vLLM's counters and look at the engine.

        Args:
            scheduler: vLLM's.
            pending_first_s: when a first token that is in flight will come.
        """
        running = self._sync(scheduler.running, running=True, pending_first_s=pending_first_s)
        waiting_now = [request for request in scheduler.waiting if compat.is_plannable(request)]
        waiting = self._sync(waiting_now, running=False, pending_first_s=pending_first_s)
        rows = self.table.rows
        for slot in waiting[rows["status"][waiting] != Status.BEST_EFFORT]:
            rows["cached_tokens"][slot] = compat.cached_tokens(scheduler, self.by_slot[int(slot)].request)
        return EngineView(
            table=self.table,
            running=running,
            waiting=waiting,
            free_blocks=compat.free_blocks(scheduler),
            total_blocks=compat.total_blocks(scheduler),
            block_size=scheduler.block_size,
            max_num_seqs=scheduler.max_num_running_reqs,
            max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
        )

    def _sync(self, requests: Sequence[Request], *, running: bool, pending_first_s: float) -> SlotArray:
        known = [self.by_id[request.request_id] for request in requests if request.request_id in self.by_id]
        slots = np.array([tracked.slot for tracked in known], dtype=np.int64)
        if not known:
            return slots
        rows = self.table.rows
        # vLLM counts drafts in flight as if all were right; a plan counts on none of them.
        unsure = [min(tracked.drafts_in_flight, compat.tokens_in_flight(tracked.request)) for tracked in known]
        computed = np.array([tracked.request.num_computed_tokens for tracked in known]) - unsure
        made = [tracked.request.num_output_tokens + compat.tokens_in_flight(tracked.request) for tracked in known]
        outputs = np.array(made) - unsure
        # A streaming-input session appends to its prompt, so that is read anew as well.
        rows["prompt_tokens"][slots] = [tracked.request.num_prompt_tokens for tracked in known]
        rows["computed_tokens"][slots] = computed
        rows["output_tokens"][slots] = outputs
        rows["stage_tokens"][slots] = outputs - np.array([tracked.stage_offset for tracked in known])
        rows["draft_limit"][slots] = [len(tracked.request.spec_token_ids) for tracked in known]
        rows["running"][slots] = running
        pending = slots[np.isnan(rows["stage_start_s"][slots]) & (rows["stage_tokens"][slots] > 0)]
        rows["stage_start_s"][pending] = pending_first_s
        rows["last_token_s"][pending] = pending_first_s
        return slots

    def note(self, plan: StepPlan) -> None:
        """Remember what a plan decided about each request's promise."""
        for slot in plan.admitted.tolist():
            self.by_slot[slot].was_admitted = True
        for slot in plan.preempt.tolist():
            self.by_slot[slot].planned_preemptions += 1
        outputs = self.table.rows["output_tokens"]
        for slot in plan.demoted.tolist():
            self.by_slot[slot].reason = "ttft" if outputs[slot] == 0 else "tpot"

    def drafts_sent(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Note the drafts of a step that was scheduled."""
        for request_id, tokens in drafts.items():
            if request_id in self.by_id:
                self.by_id[request_id].drafts_in_flight += len(tokens)

    def drafts_verified(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """The tokens of a step that :meth:`drafts_sent` was told of have come."""
        for request_id, tokens in drafts.items():
            if request_id in self.by_id:
                tracked = self.by_id[request_id]
                tracked.drafts_in_flight = max(tracked.drafts_in_flight - len(tokens), 0)

    def shape(self, num_scheduled_tokens: Mapping[str, int], drafts: Mapping[str, Sequence[int]]) -> BatchShape:
        """What a scheduled batch asks of the hardware; to be called before its tokens are counted in the table."""
        known = [
            (self.by_id[key].slot, count, len(drafts.get(key, ())))
            for key, count in num_scheduled_tokens.items()
            if key in self.by_id
        ]
        if not known:
            return BatchShape(new_tokens=0)
        slots, tokens, drafted = np.array(known, dtype=np.int64).T
        rows = self.table.rows
        done = rows["computed_tokens"][slots] + np.where(rows["running"][slots] == 1, 0, rows["cached_tokens"][slots])
        quad = np.where((tokens > 1) & (drafted == 0), tokens * (tokens + 2 * done), 0)
        return BatchShape(
            new_tokens=int(tokens.sum()),
            context_tokens=int(done.sum()),
            quad_tokens2=int(quad.sum()),
            num_seqs=len(slots),
            draft_steps=int(drafted.max()),
            draft_tokens=int(drafted.sum()),
        )

    def tokens_came(self, request_ids: Iterable[str], now_s: float) -> None:
        """Note the time of new tokens of requests that carry a promise, and cross stage boundaries."""
        rows = self.table.rows
        for request_id in request_ids:
            tracked = self.by_id.get(request_id)
            if tracked is None or tracked.slo_class is None:
                continue
            total = tracked.request.num_output_tokens
            if total == tracked.seen_tokens:
                continue
            if tracked.stage_start_s is None:
                tracked.stage_start_s = now_s
                rows["stage_start_s"][tracked.slot] = now_s
            if tracked.first_token_s is None:
                tracked.first_token_s = now_s
                # A first token that came late cannot be made up for.
                rows["missed"][tracked.slot] |= now_s > tracked.ttft_due_s
            tracked.last_token_s = now_s
            rows["last_token_s"][tracked.slot] = now_s
            if len(tracked.slo_class.stages) > 1:
                self._cross_stages(tracked, total, now_s)
            tracked.seen_tokens = total

    def _cross_stages(self, tracked: Tracked, total: int, now_s: float) -> None:
        """Move to the next stage when the current one ended with one of the new tokens.

        That token belongs to the stage it ended; the new stage begins with the next one, which may be in flight.
        """
        assert tracked.slo_class is not None
        stages = tracked.slo_class.stages
        new_tokens = tracked.request.output_token_ids[tracked.seen_tokens : total]
        for position, token in enumerate(new_tokens, tracked.seen_tokens + 1):
            if tracked.stage + 1 >= len(stages):
                return
            stage = stages[tracked.stage]
            in_stage = position - tracked.stage_offset
            if token != stage.end_token_id and in_stage != stage.max_tokens:
                continue
            tracked.stages_ok &= stage_kept(tracked, in_stage, now_s)
            tracked.stage += 1
            tracked.stage_offset = position
            tracked.stage_start_s = now_s if position < total else None
            row = self.table.rows[tracked.slot]
            row["tpot_s"] = stages[tracked.stage].slo.tpot_s
            row["stage_tokens"] = total - position
            row["stage_start_s"] = now_s if position < total else np.nan
            row["missed"] |= not tracked.stages_ok


def stage_kept(tracked: Tracked, num_tokens: int, end_s: float) -> bool:
    """Whether the current stage's mean time per output token is at or under its target."""
    assert tracked.slo_class is not None
    if num_tokens <= 1 or tracked.stage_start_s is None:
        return True
    tpot_s = tracked.slo_class.stages[tracked.stage].slo.tpot_s
    return (end_s - tracked.stage_start_s) / (num_tokens - 1) <= tpot_s
