"""The plug-in's book of requests: vLLM's request objects mirrored into the planner's table.

Progress of running requests is read from vLLM's own counters before every plan, so nothing that vLLM does by itself
(preemption, abort, stale output) can leave the table behind. Rows of waiting requests change only when a request comes,
is preempted or promoted; the book looks at them only then. Times are the book's own: when tokens came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.errors import PlanMismatchError
from slos_serve.core.plan import StepPlan
from slos_serve.core.request import RequestTable, SlotArray, Status
from slos_serve.core.slo import SLOClass
from slos_serve.perf.batch_time import BatchShape
from slos_serve.planning.planner import promises_made
from slos_serve.vllm_plugin import compat, compat_counters
from slos_serve.vllm_plugin.tracked import Promise, Tracked

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


class _Running:
    """Requests of which rows are written together, with what of them stays the same from step to step.

    Attributes:
        tracked, slots, requests: the requests, their rows, vLLM's objects.
        ends: see :func:`slos_serve.vllm_plugin.compat_counters.ends_of`.
        stage_offsets: int64 [n], output tokens that came before each one's stage.
    """

    def __init__(self, several: Sequence[Tracked], slots: SlotArray) -> None:
        self.tracked, self.slots = several, slots
        self.requests = [tracked.request for tracked in several]
        self.ends = compat_counters.ends_of(self.requests)
        self.stage_offsets = np.array([tracked.stage_offset for tracked in several], dtype=np.int64)


class RequestBook:
    """Every unfinished request of one engine.

    Attributes:
        table: the planner's rows.
        by_id, by_slot: the requests by vLLM's id and by row.
        sessions: of them, streaming-input sessions by row.
        num_slo: how many of them carry a promise.
    """

    def __init__(self) -> None:
        self.table = RequestTable()
        self.by_id: dict[str, Tracked] = {}
        self.by_slot: dict[int, Tracked] = {}
        self.sessions: dict[int, Tracked] = {}
        self.num_slo = 0
        self._slot_by_id: dict[str, int] = {}
        self._was_running: set[int] = set()
        self._running_list: list[Request] | None = None
        self._running = _Running([], np.empty(0, dtype=np.int64))
        self._requests: NDArray[np.object_] = np.full(len(self.table.rows), None, dtype=object)

    def add(self, request: Request, promise: Promise, *, fixed_blocks: int = 0) -> Tracked:
        """Enter a new request."""
        slo_class = promise.slo_class
        slot = self.table.add(
            arrival_s=promise.arrival_s,
            prompt_tokens=request.num_prompt_tokens,
            max_tokens=promise.max_tokens,
            ttft_due_s=promise.planned_due_s,
            tpot_s=slo_class.slo.tpot_s if slo_class else np.inf,
            class_index=promise.class_index,
            weight=max(slo_class.weight, 1e-6) if slo_class else 1.0,
            max_stall_s=slo_class.max_stall_ms / 1000.0 if slo_class else np.inf,
            hint_tokens=promise.hint_tokens,
            adapter=compat.adapter_of(request),
            fixed_blocks=fixed_blocks,
        )
        tracked = Tracked(request, slot, promise, fixed_blocks=fixed_blocks)
        self.by_id[request.request_id] = tracked
        self._slot_by_id[request.request_id] = slot
        self.by_slot[slot] = tracked
        if slot >= len(self._requests):
            self._requests = np.append(self._requests, np.full(slot + 1, None, dtype=object))
        self._requests[slot] = request
        if request.resumable:
            self.sessions[slot] = tracked
        self.num_slo += slo_class is not None
        return tracked

    def begin_turn(self, tracked: Tracked, promise: Promise) -> None:
        """A streaming-input session goes on with another chunk: a promise of its own."""
        self.num_slo += (promise.slo_class is not None) - (tracked.promise.slo_class is not None)
        tracked.begin_turn(promise)
        self._running_list = None
        slo_class, row = promise.slo_class, self.table.rows[tracked.slot]
        has_slo = bool(np.isfinite(promise.planned_due_s) or (slo_class and np.isfinite(slo_class.slo.tpot_s)))
        row["arrival_s"] = row["last_token_s"] = promise.arrival_s
        row["prompt_tokens"] = tracked.request.num_prompt_tokens
        row["max_tokens"] = promise.max_tokens
        row["expected_tokens"] = min(promise.hint_tokens, promise.max_tokens) or promise.max_tokens
        row["hint_tokens"] = promise.hint_tokens
        row["ttft_due_s"] = promise.planned_due_s
        row["tpot_s"] = slo_class.slo.tpot_s if slo_class else np.inf
        row["class_index"] = promise.class_index
        row["stage_start_s"] = np.nan
        row["stage_tokens"] = row["output_tokens"] = 0
        row["has_slo"], row["missed"] = has_slo, False
        row["status"] = Status.UNDECIDED if has_slo else Status.BEST_EFFORT

    def remove(self, request_id: str) -> Tracked | None:
        """Forget a finished request; ``None`` if it was not known."""
        tracked = self.by_id.pop(request_id, None)
        if tracked is not None:
            del self.by_slot[tracked.slot], self._slot_by_id[request_id]
            self._requests[tracked.slot] = None
            self._running_list = None
            self.sessions.pop(tracked.slot, None)
            self._was_running.discard(tracked.slot)
            self.table.remove(tracked.slot)
            self.num_slo -= tracked.promise.slo_class is not None
        return tracked

    def status(self, tracked: Tracked) -> Status:
        """Where its promise stands."""
        return Status(int(self.table.rows["status"][tracked.slot]))

    # Before a plan -------------------------------------------------------------------------------------------

    def sync_running(self, scheduler: Scheduler, pending_first_s: float) -> SlotArray:
        """Bring the rows of running requests up to date; int64 slots in vLLM's order.

        Args:
            scheduler: vLLM's.
            pending_first_s: when a first token that is in flight will come.
        """
        if scheduler.running != self._running_list:
            self._running_list = list(scheduler.running)
            known = self.known_of(self._running_list)
            self._running = _Running(known, np.array([tracked.slot for tracked in known], dtype=np.int64))
            now_running = set(self._running.slots.tolist())
            self.sync_waiting([self.by_slot[slot] for slot in self._was_running - now_running])
            self._was_running = now_running
        running, rows = self._running, self.table.rows
        slots = running.slots
        if len(slots):
            counted = compat_counters.counters(running.requests)
            self._write(running, counted, speculates=bool(scheduler.num_spec_tokens))
            rows["running"][slots] = 1
            rows["blocked"][slots] = compat_counters.cannot_run_now(scheduler, running.requests, counted, running.ends)
            pending = slots[np.isnan(rows["stage_start_s"][slots]) & (rows["stage_tokens"][slots] > 0)]
            rows["stage_start_s"][pending] = pending_first_s
            rows["last_token_s"][pending] = pending_first_s
        return slots

    def sync_waiting(self, several: Sequence[Tracked]) -> None:
        """Bring the rows of requests up to date that do not run (any more)."""
        self._sync_at_rest(several, running=0)

    def sync_sessions(self, sessions: Sequence[Tracked]) -> SlotArray:
        """Bring the rows of sessions up to date that wait for a turn with their slot; int64 slots."""
        slots = self._sync_at_rest(sessions, running=1)
        self._was_running.update(slots.tolist())
        self._running_list = None
        return slots

    def _sync_at_rest(self, several: Sequence[Tracked], running: int) -> SlotArray:
        slots = np.array([tracked.slot for tracked in several], dtype=np.int64)
        if len(slots):
            at_rest = _Running(several, slots)
            counted = compat_counters.counters(at_rest.requests)
            self._write(at_rest, counted, speculates=True)
            rows = self.table.rows
            rows["running"][slots], rows["blocked"][slots] = running, 0
            # KV that a request holds is computed; what a cache had of it is part of that.
            rows["cached_tokens"][slots[counted[0] > 0]] = 0
        return slots

    def _write(self, several: _Running, counted: tuple[SlotArray, SlotArray, SlotArray], *, speculates: bool) -> None:
        """Write vLLM's counters into rows. It counts drafts in flight as if all were right; a plan counts on none."""
        computed, outputs, in_flight = counted
        rows, slots = self.table.rows, several.slots
        if speculates:
            drafts = np.array([tracked.drafts_in_flight for tracked in several.tracked], dtype=np.int64)
            unsure = np.minimum(drafts, in_flight)
            computed, in_flight = computed - unsure, in_flight - unsure
            rows["draft_limit"][slots] = [len(request.spec_token_ids) for request in several.requests]
        outputs = outputs + in_flight
        rows["computed_tokens"][slots] = computed
        rows["output_tokens"][slots] = outputs
        rows["stage_tokens"][slots] = outputs - several.stage_offsets

    def known_of(self, requests: Iterable[Request]) -> list[Tracked]:
        """What is tracked of vLLM's requests, in the same order."""
        by_id = self.by_id
        return [by_id[request.request_id] for request in requests if request.request_id in by_id]

    def requests_of(self, slots: SlotArray) -> list[Request]:
        """vLLM's requests in these rows.

        Raises:
            PlanMismatchError: a slot holds no request.
        """
        if len(slots) and not (slots.min() >= 0 and slots.max() < len(self._requests)):
            raise PlanMismatchError("the plan names a slot that is not there")
        found: list[Request] = self._requests[slots].tolist()
        if None in found:
            raise PlanMismatchError("the plan names a slot that holds no request")
        return found

    # After a step --------------------------------------------------------------------------------------------

    def note(self, plan: StepPlan, ran: SlotArray) -> None:
        """Remember what a committed plan decided about each request's promise."""
        rows = self.table.rows
        for slot in promises_made(plan, rows, ran).tolist():
            self.by_slot[slot].given = self.by_slot[slot].rank
        for slot in plan.preempt.tolist():
            self.by_slot[slot].planned_preemptions += 1
        for slot in plan.demoted.tolist():
            self.by_slot[slot].reason = "ttft" if rows["output_tokens"][slot] == 0 else "tpot"

    def fall_back(self, demoted: SlotArray, earliest_s: float) -> None:
        """Promises that a committed plan gave up before a first token: ask for the next weaker ones from now on.

        Args:
            demoted: slots.
            earliest_s: when a first token of theirs can come at the earliest: the end of the plan's step.
        """
        rows = self.table.rows
        for slot in demoted[rows["output_tokens"][demoted] == 0].tolist():
            tracked = self.by_slot[slot]
            if not tracked.first.weaker:
                continue
            rows["status"][slot] = Status.UNDECIDED if tracked.fall_back(earliest_s) else Status.BEST_EFFORT
            slo_class = tracked.promise.slo_class
            assert slo_class is not None  # only promises have weaker ones
            rows["ttft_due_s"][slot] = tracked.promise.planned_due_s
            rows["tpot_s"][slot] = slo_class.slo.tpot_s

    def slots_of(self, request_ids: Iterable[str]) -> SlotArray:
        """Rows of requests by vLLM's id; int64, those that are not known left out."""
        slots = list(map(self._slot_by_id.get, request_ids))
        if None in slots:
            slots = [slot for slot in slots if slot is not None]
        return np.array(slots, dtype=np.int64)

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

    def shape(
        self, slots: SlotArray, num_scheduled_tokens: Mapping[str, int], drafts: Mapping[str, Sequence[int]]
    ) -> BatchShape:
        """What a batch that vLLM has just scheduled asks of the hardware; its counters include the batch already.

        Args:
            slots: its :meth:`slots_of`.
            num_scheduled_tokens, drafts: what vLLM says of it.
        """
        if len(slots) < len(num_scheduled_tokens):
            num_scheduled_tokens = {key: count for key, count in num_scheduled_tokens.items() if key in self.by_id}
        if not len(slots):
            return BatchShape(new_tokens=0)
        tokens = np.fromiter(num_scheduled_tokens.values(), dtype=np.int64, count=len(slots))
        done = compat_counters.computed_tokens(self.requests_of(slots)) - tokens
        drafted = np.zeros(len(slots), dtype=np.int64)
        if drafts:
            drafted[:] = [len(drafts.get(key, ())) for key in num_scheduled_tokens]
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
        by_id, came = self.by_id, []
        for request_id in request_ids:
            tracked = by_id.get(request_id)
            if tracked is None or tracked.promise.slo_class is None:
                continue
            total = tracked.request.num_output_tokens
            if total == tracked.seen_tokens:
                continue
            came.append(tracked.slot)
            if tracked.stage_start_s is None or tracked.more_stages:
                self._stage_goes_on(tracked, total, now_s)
            else:
                tracked.last_token_s, tracked.seen_tokens = now_s, total
        self.table.rows["last_token_s"][came] = now_s

    def _stage_goes_on(self, tracked: Tracked, total: int, now_s: float) -> None:
        """New tokens of a request of which a stage begins, or may end, with them."""
        stage_before = tracked.stage
        tracked.tokens_came(total, now_s)
        row = self.table.rows[tracked.slot]
        row["stage_start_s"] = np.nan if tracked.stage_start_s is None else tracked.stage_start_s
        # A broken promise cannot be made up for: a first token that came late, a finished stage that was slow.
        row["missed"] |= not (tracked.first_in_time and tracked.stages_kept)
        if tracked.stage != stage_before:
            row["tpot_s"] = tracked.stages[tracked.stage].slo.tpot_s
            row["stage_tokens"] = total - tracked.stage_offset
            self._running_list = None


def class_index_of(classes: Mapping[str, int], slo_class: SLOClass | None) -> int:
    """Index of a class for the planner's statistics: those of the file, then custom numbers, then none."""
    if slo_class is None:
        return len(classes) + 1
    return classes.get(slo_class.name, len(classes))
