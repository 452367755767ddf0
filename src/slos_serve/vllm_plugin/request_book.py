"""The plug-in's book of requests: vLLM's request objects mirrored into the planner's table.

Progress of running requests is read from vLLM's own counters before every plan, so nothing that vLLM does by itself
(preemption, abort, stale output) can leave the table behind. Rows of waiting requests change only when a request comes,
is preempted or promoted; the book looks at them only then. Times are the book's own: when tokens came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.plan import StepPlan
from slos_serve.core.request import RequestTable, SlotArray, Status, share_of
from slos_serve.core.slo import SLOClass
from slos_serve.perf.batch_time import BatchShape
from slos_serve.planning.planner import promises_made
from slos_serve.vllm_plugin import compat, compat_counters, row_kernels
from slos_serve.vllm_plugin.progress import AUDIT_EVERY, Progress
from slos_serve.vllm_plugin.tracked import Promise, Tracked

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

_NONE: SlotArray = np.empty(0, dtype=np.int64)


class RequestBook:
    """Every unfinished request of one engine.

    Args:
        advances_alone: see :func:`slos_serve.vllm_plugin.compat_counters.advances_alone`.

    Attributes:
        table: the planner's rows.
        by_id, by_slot: the requests by vLLM's id and by row.
        sessions: of them, streaming-input sessions by row.
        num_slo: how many of them carry a promise.
        progress: columns beside the table.
    """

    def __init__(self, *, advances_alone: bool = False) -> None:
        self.table = RequestTable()
        self.by_id: dict[str, Tracked] = {}
        self.by_slot: dict[int, Tracked] = {}
        self.sessions: dict[int, Tracked] = {}
        self.num_slo = 0
        self._slot_by_id: dict[str, int] = {}
        self._slot_by_object: dict[int, int] = {}
        self.progress = Progress(len(self.table.rows))
        self._listed: SlotArray = np.empty(0, dtype=np.int64)
        self._removed: set[int] = set()
        self._running_list: list[Request] | None = None
        self._running: list[Request] = []
        self._running_slots: SlotArray = np.empty(0, dtype=np.int64)
        self._advances_alone = advances_alone
        self._has_advanced, self._steps_certain, self._shrinks = False, 0, False

    def add(self, request: Request, promise: Promise, *, fixed_blocks: int = 0, decode_blocks: int = 0) -> Tracked:
        """Enter a new request, with what it takes of KV beside its tokens: see :class:`Tracked`."""
        slo_class = promise.slo_class
        slot = self.table.add(
            arrival_s=promise.arrival_s,
            prompt_tokens=request.num_prompt_tokens,
            max_tokens=promise.max_tokens,
            ttft_due_s=promise.planned_due_s,
            tpot_s=slo_class.slo.tpot_s if slo_class else np.inf,
            answer_due_s=promise.planned_answer_due_s,
            class_index=promise.class_index,
            share=promise.share,
            weight=promise.weight,
            max_stall_s=slo_class.max_stall_ms / 1000.0 if slo_class else np.inf,
            hint_tokens=promise.hint_tokens,
            adapter=compat.adapter_of(request),
            fixed_blocks=fixed_blocks,
        )
        tracked = Tracked(request, slot, promise, fixed_blocks=fixed_blocks, decode_blocks=decode_blocks)
        self._shrinks |= decode_blocks < fixed_blocks
        self.by_id[request.request_id] = tracked
        self._slot_by_id[request.request_id] = self._slot_by_object[id(request)] = slot
        self.by_slot[slot] = tracked
        self.progress.enter(tracked, len(self.table.rows))
        if request.resumable:
            self.sessions[slot] = tracked
        self.num_slo += slo_class is not None
        return tracked

    def honour(self, tracked: Tracked, rank: int) -> bool:
        """Promise a new request what its client was told; False when it asks for nothing."""
        row = self.table.rows[tracked.slot]
        if not row["has_slo"]:
            return False
        tracked.honour(rank)
        self._write_promise(tracked.slot, tracked.promise)
        row["status"] = Status.ADMITTED
        return True

    def begin_turn(self, tracked: Tracked, promise: Promise) -> None:
        """A streaming-input session goes on with another chunk: a promise of its own."""
        self.num_slo += (promise.slo_class is not None) - (tracked.promise.slo_class is not None)
        self.progress.settle(tracked)
        tracked.begin_turn(promise)
        self.progress.enter(tracked, len(self.table.rows))
        self._running_list = None
        slo_class, row = promise.slo_class, self.table.rows[tracked.slot]
        tpot_s = slo_class.slo.tpot_s if slo_class else np.inf
        has_slo = bool(np.isfinite(min(promise.planned_due_s, tpot_s, promise.planned_answer_due_s)))
        row["arrival_s"] = row["last_token_s"] = promise.arrival_s
        row["prompt_tokens"] = tracked.request.num_prompt_tokens
        row["max_tokens"] = promise.max_tokens
        row["expected_tokens"] = min(promise.hint_tokens, promise.max_tokens) or promise.max_tokens
        row["hint_tokens"] = promise.hint_tokens
        self._write_promise(tracked.slot, promise)
        row["class_index"] = promise.class_index
        row["share"] = share_of(promise.class_index) if promise.share is None else promise.share
        row["stage_start_s"] = np.nan
        row["stage_tokens"] = row["output_tokens"] = 0
        row["has_slo"], row["missed"] = has_slo, False
        row["status"] = Status.UNDECIDED if has_slo else Status.BEST_EFFORT

    def remove(self, request_id: str) -> Tracked | None:
        """Forget a finished request; ``None`` if it was not known."""
        tracked = self.by_id.pop(request_id, None)
        if tracked is not None:
            del self.by_slot[tracked.slot], self._slot_by_id[request_id], self._slot_by_object[id(tracked.request)]
            self.progress.leave(tracked.slot)
            self._running_list = None
            self.sessions.pop(tracked.slot, None)
            self._removed.add(tracked.slot)
            self.table.remove(tracked.slot)
            self.num_slo -= tracked.promise.slo_class is not None
        return tracked

    def status(self, tracked: Tracked) -> Status:
        """Where its promise stands."""
        return Status(int(self.table.rows["status"][tracked.slot]))

    # Before a plan -------------------------------------------------------------------------------------------

    def read_anew(self) -> None:
        """vLLM made a step by itself: all counters are to be read before the next plan."""
        self._steps_certain = 0
        self._running_list = None

    def sync_running(self, scheduler: Scheduler, pending_first_s: float) -> SlotArray:
        """Bring the rows of running requests up to date; int64 slots in vLLM's order.

        Args:
            scheduler: vLLM's.
            pending_first_s: when a first token that is in flight will come.
        """
        if scheduler.running != self._running_list:
            self._list_changed(scheduler.running)
        certain = self._advances_alone and not self.sessions
        self._has_advanced = certain and self._steps_certain % AUDIT_EVERY > 0
        slots, rows = self._running_slots, self.table.rows
        if len(slots):
            if self._has_advanced:
                self.progress.advance(self.table, slots, self._running, pending_first_s)
            else:
                counted = self._read(self._running, slots, speculates=bool(scheduler.num_spec_tokens))
                ends = self.progress.ends[slots]
                rows["blocked"][slots] = compat_counters.cannot_run_now(scheduler, self._running, counted, ends)
                row_kernels.note_pending(rows, slots, pending_first_s)
            if self._shrinks:
                self.progress.charge_blocks(self.table, slots)
        self._steps_certain += certain
        return slots

    def _list_changed(self, running: Sequence[Request]) -> None:
        """Requests have begun or ceased to run: read all counters of these."""
        stay = self._running_slots[self.progress.listed[self._running_slots]]
        if self.sessions or self.progress.requests[stay].tolist() != running[: len(stay)]:
            stay = _NONE  # somebody was preempted, and may have started again
        behind = running[len(stay) :]
        slots = list(map(self._slot_by_object.get, map(id, behind)))
        self._running_list = self._running = list(running)
        if None in slots:
            self._running = [one for one in running if id(one) in self._slot_by_object]
            slots = [slot for slot in slots if slot is not None]
        self._running_slots = np.concatenate((stay, np.array(slots, dtype=np.int64)))
        now, before, listed = self._running_slots, self._listed, self.progress.listed
        come = now[~listed[now]]
        listed[before] = False
        listed[now] = True
        gone = before[~listed[before]].tolist()
        self.sync_waiting([self.by_slot[slot] for slot in gone if slot not in self._removed])
        self._listed = now
        self._removed.clear()
        if len(come):
            self._read(self.progress.requests_of(come), come, speculates=False)
        self.table.rows["running"][self._running_slots] = 1

    def sync_waiting(self, several: Sequence[Tracked]) -> None:
        """Bring the rows of requests up to date that do not run (any more)."""
        self._sync_at_rest(several, running=0)

    def sync_sessions(self, sessions: Sequence[Tracked]) -> SlotArray:
        """Bring the rows of sessions up to date that wait for a turn with their slot; int64 slots."""
        slots = self._sync_at_rest(sessions, running=1)
        self.progress.listed[slots] = True
        self._listed = np.union1d(self._listed, slots)
        self._running_list = None
        return slots

    def _sync_at_rest(self, several: Sequence[Tracked], running: int) -> SlotArray:
        slots = np.array([tracked.slot for tracked in several], dtype=np.int64)
        if len(slots):
            counted = self._read([tracked.request for tracked in several], slots, speculates=True)
            rows = self.table.rows
            rows["running"][slots], rows["blocked"][slots] = running, 0
            if self._shrinks:
                rows["fixed_blocks"][slots] = self.progress.fixed_blocks[slots]
            # KV that a request holds is computed; what a cache had of it is part of that.
            rows["cached_tokens"][slots[counted[0] > 0]] = 0
        return slots

    def _read(
        self, requests: Sequence[Request], slots: SlotArray, *, speculates: bool
    ) -> tuple[SlotArray, SlotArray, SlotArray]:
        """Write vLLM's counters into rows. It counts drafts in flight as if all were right; a plan counts on none."""
        computed, outputs, in_flight = counted = compat_counters.counters(requests)
        rows = self.table.rows
        if speculates:
            by_slot = self.by_slot
            drafts = np.array([by_slot[slot].drafts_in_flight for slot in slots.tolist()], dtype=np.int64)
            unsure = np.minimum(drafts, in_flight)
            computed, in_flight = computed - unsure, in_flight - unsure
            rows["draft_limit"][slots] = [len(request.spec_token_ids) for request in requests]
        outputs = outputs + in_flight
        rows["computed_tokens"][slots] = computed
        rows["output_tokens"][slots] = outputs
        rows["stage_tokens"][slots] = outputs - self.progress.stage_offsets[slots]
        return counted

    def known_of(self, requests: Iterable[Request]) -> list[Tracked]:
        """What is tracked of vLLM's requests, in the same order."""
        by_id = self.by_id
        return [by_id[request.request_id] for request in requests if request.request_id in by_id]

    # After a step --------------------------------------------------------------------------------------------

    def note(self, plan: StepPlan, ran: SlotArray) -> list[tuple[int, int]]:
        """Remember what a committed plan decided about each request's promise.

        Returns:
            Open ticket and rank of each promise that was made to a client who does not know yet.
        """
        rows, made = self.table.rows, []
        for slot in promises_made(plan, rows, ran).tolist():
            tracked = self.by_slot[slot]
            tracked.given = tracked.rank
            if tracked.open_ticket is not None:
                made.append((tracked.open_ticket, tracked.rank))
                tracked.open_ticket = None
        for slot in plan.preempt.tolist():
            self.by_slot[slot].planned_preemptions += 1
        for slot in plan.demoted.tolist():
            self.by_slot[slot].reason = "ttft" if rows["output_tokens"][slot] == 0 else "tpot"
        return made

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
            self._write_promise(slot, tracked.promise)

    def _write_promise(self, slot: int, promise: Promise) -> None:
        """What a promise says of its first stage, into a row."""
        row, slo_class = self.table.rows[slot], promise.slo_class
        row["ttft_due_s"] = row["promised_ttft_due_s"] = promise.planned_due_s
        row["tpot_s"] = row["promised_tpot_s"] = slo_class.slo.tpot_s if slo_class else np.inf
        row["answer_due_s"] = promise.planned_answer_due_s
        row["weight"] = promise.weight

    def slots_of(self, request_ids: Iterable[str]) -> SlotArray:
        """Rows of requests by vLLM's id; int64, those that are not known left out."""
        slots = list(map(self._slot_by_id.get, request_ids))
        if None in slots:
            slots = [slot for slot in slots if slot is not None]
        return np.fromiter(slots, np.int64, len(slots))

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
        self,
        slots: SlotArray,
        num_scheduled_tokens: Mapping[str, int],
        drafts: Mapping[str, Sequence[int]],
        *,
        planned: bool,
    ) -> BatchShape:
        """What a batch that vLLM has just scheduled asks of the hardware; its counters include the batch already.

        Args:
            slots: its :meth:`slots_of`.
            num_scheduled_tokens, drafts: what vLLM says of it.
            planned: whether the rows were brought up to date just before the batch.
        """
        if len(slots) < len(num_scheduled_tokens):
            num_scheduled_tokens = {key: count for key, count in num_scheduled_tokens.items() if key in self.by_id}
        if not len(slots):
            return BatchShape(new_tokens=0)
        tokens = np.fromiter(num_scheduled_tokens.values(), dtype=np.int64, count=len(slots))
        drafted = np.array([len(drafts.get(key, ())) for key in num_scheduled_tokens] if drafts else (), dtype=np.int64)
        done = self._computed_before(slots, tokens, planned=planned)
        total, context, units = row_kernels.batch_sums(self.table.rows, slots, tokens, drafted, done)
        if len(done) and planned and self._advances_alone:
            self.table.rows["computed_tokens"][slots] = done + tokens
        return BatchShape(
            new_tokens=total,
            context_tokens=context,
            quad_tokens2=units,
            num_seqs=len(slots),
            draft_steps=int(drafted.max(initial=0)),
            draft_tokens=int(drafted.sum()) if len(drafted) else 0,
        )

    def _computed_before(self, slots: SlotArray, tokens: SlotArray, *, planned: bool) -> SlotArray:
        """Tokens with KV that requests had before a batch of ``tokens``; empty where their rows say so."""
        requests = self.progress.requests
        if not (planned and self._has_advanced):
            return compat_counters.computed_tokens(requests[slots].tolist()) - tokens
        started = np.flatnonzero(~self.progress.listed[slots])
        if len(started):
            begun = slots[started]
            computed = compat_counters.computed_tokens(requests[begun].tolist())
            self.table.rows["computed_tokens"][begun] = computed - tokens[started]
        return _NONE

    def tokens_came(self, request_ids: Iterable[str], now_s: float) -> None:
        """Note the time of new tokens of requests that carry a promise, and cross stage boundaries."""
        came, staged, totals = self.progress.came(self.slots_of(request_ids), now_s)
        for slot, total in zip(staged.tolist(), totals.tolist(), strict=True):
            self._stage_goes_on(self.by_slot[slot], total, now_s)
        self.table.rows["last_token_s"][came] = now_s

    def last_tokens(self, request_id: str, now_s: float) -> Tracked | None:
        """Note a request's last tokens before it is judged; ``None`` if it is not known."""
        tracked = self.by_id.get(request_id)
        if tracked is not None:
            self.tokens_came((request_id,), now_s)
            self.progress.settle(tracked)
        return tracked

    def _stage_goes_on(self, tracked: Tracked, total: int, now_s: float) -> None:
        """New tokens of a request of which a stage begins, or may end, with them."""
        stage_before = tracked.stage
        tracked.tokens_came(total, now_s)
        self.progress.note(tracked)
        row = self.table.rows[tracked.slot]
        row["stage_start_s"] = np.nan if tracked.stage_start_s is None else tracked.stage_start_s
        # A broken promise cannot be made up for: a first token that came late, a finished stage that was slow.
        row["missed"] |= not (tracked.first_in_time and tracked.stages_kept)
        if tracked.stage != stage_before:
            row["tpot_s"] = row["promised_tpot_s"] = tracked.stages[tracked.stage].slo.tpot_s
            row["stage_tokens"] = total - tracked.stage_offset


def class_index_of(classes: Mapping[str, int], slo_class: SLOClass | None) -> int:
    """Index of a class for the planner's statistics: those of the file, then custom numbers, then none."""
    if slo_class is None:
        return len(classes) + 1
    return classes.get(slo_class.name, len(classes))
