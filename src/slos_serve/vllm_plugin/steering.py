"""Making stock ``schedule()`` follow a step plan: by order and budget, never by copying it.

A plan becomes a :class:`Selection` first: the planned requests that vLLM would accept now, within every limit that
vLLM asserts. For one step the running list holds only the selected running requests in the plan's order, the queue that
vLLM empties first holds only those that start, and the token budget is their sum. All other requests are set aside and
put back right after, in the engine's own order, whatever happened in between.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.errors import PlanMismatchError
from slos_serve.core.plan import StepPlan
from slos_serve.core.request import SlotArray
from slos_serve.vllm_plugin import compat, row_kernels
from slos_serve.vllm_plugin.kv_needs import KVNeeds
from slos_serve.vllm_plugin.request_book import RequestBook
from slos_serve.vllm_plugin.tracked import Tracked

if TYPE_CHECKING:
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

# So many requests are taken out of a queue one by one.
FEW = 4
_FAULTS = {
    row_kernels.OUT_OF_RANGE: "the plan names a slot that is not there",
    row_kernels.TWICE: "the plan names a request twice",
    row_kernels.EMPTY: "the plan names a slot that holds no request",
    row_kernels.WAITS: "the plan runs a request that waits",
}


@dataclass(slots=True)
class Selection:
    """One step as vLLM is to make it.

    Attributes:
        run: running requests that get tokens, in order.
        start: waiting requests that start, in order, behind the running ones.
        preempt: running requests that give their KV back before the step.
        loads: waiting requests whose KV a connector is to load; they take no tokens.
        unfit_loads: planned ones whose load would take blocks that prompts in progress still need.
        budget: tokens of the step.
        most_tokens_each: no request may get more tokens than this; 0 for no such limit.
        drafts: drafts that each of ``run`` is to verify; empty without speculation.
        slots: int64, rows of ``run`` and ``start``.
        started, preempted, loading: after the step, who started, was preempted, and whose KV is being loaded.
    """

    run: list[Request] = field(default_factory=list)
    start: list[Request] = field(default_factory=list)
    preempt: list[Request] = field(default_factory=list)
    loads: list[Request] = field(default_factory=list)
    unfit_loads: list[Request] = field(default_factory=list)
    budget: int = 0
    most_tokens_each: int = 0
    drafts: list[int] = field(default_factory=list)
    slots: SlotArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    started: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    loading: list[Request] = field(default_factory=list)


def select(
    scheduler: Scheduler, plan: StepPlan, book: RequestBook, needs: KVNeeds, loads: Sequence[Tracked]
) -> Selection:
    """What of a plan vLLM would accept now.

    Raises:
        PlanMismatchError: the plan names a request twice or a slot that holds none, or the table does not agree with
            vLLM's lists.
    """
    progress, slots = book.progress, plan.slots
    chosen, may_start = Selection(preempt=progress.requests_of(plan.preempt)), True
    if chosen.preempt and not _give_back(scheduler, chosen.preempt):
        # Blocks that stay fenced help nobody in this step: no preemption, and nobody starts on the strength of it.
        chosen.preempt, may_start = [], False
    sessions = [one for one in book.sessions.values() if compat.holds_slot(one.request)]
    limits = _Room(scheduler, len(scheduler.running) - len(chosen.preempt), chosen.preempt, sessions)
    fault, runs, starts = row_kernels.sort_out(
        book.table.rows, slots, progress.taken, progress.listed, limits.session_slots, plan.preempt
    )
    if fault != row_kernels.RIGHT:
        raise PlanMismatchError(_FAULTS[fault])
    chosen.run = progress.requests[slots[runs]].tolist()
    planned = plan.draft_tokens[runs] if len(plan.draft_tokens) else np.zeros(len(runs), dtype=np.int64)
    chosen.drafts = limits.take_running(chosen.run, plan.tokens[runs], planned)
    to_load, begun = {tracked.slot for tracked in loads}, []
    for position in starts.tolist() if may_start else ():
        slot, count = int(slots[position]), int(plan.tokens[position])
        request = book.by_slot[slot].request
        if slot not in to_load and compat.may_start(request) and limits.takes_start(request, count):
            chosen.start.append(request)
            begun.append(slot)
    chosen.slots = np.concatenate((slots[runs], np.array(begun, dtype=np.int64)))
    chosen.budget = limits.tokens
    chosen.loads, chosen.unfit_loads = _loads_that_fit(scheduler, plan, book, needs, loads)
    if chosen.loads:
        # vLLM looks at waiting requests only while budget is left. One token more is enough, if no chunk takes it.
        chosen.budget, chosen.most_tokens_each = limits.with_one_left(chosen), limits.largest
    return chosen


def _give_back(scheduler: Scheduler, preempt: Sequence[Request]) -> bool:
    """Whether all of these run and give their blocks back at once when they are preempted."""
    running = {id(request) for request in scheduler.running}
    return all(id(request) in running and compat.can_preempt(scheduler, request) for request in preempt)


class _Room:
    """The limits that vLLM asserts, as a selection fills them.

    Attributes:
        session_slots: rows of sessions that wait for a turn with their worker's slot.
        tokens, largest: tokens taken in all, and by one request at most.
    """

    def __init__(
        self, scheduler: Scheduler, num_running: int, preempted: Sequence[Request], sessions: Sequence[Tracked]
    ) -> None:
        self.session_slots = np.array([tracked.slot for tracked in sessions], dtype=np.int64)
        self._sessions = {id(tracked.request) for tracked in sessions}
        self._slots = compat.most_running(scheduler) - num_running - len(sessions)
        self._most_adapters = compat.most_adapters(scheduler)
        self._adapters: set[int] = set()
        if self._most_adapters:
            gone = {id(request) for request in preempted}
            stay = [*scheduler.running, *(tracked.request for tracked in sessions)]
            self._adapters = {compat.adapter_of(request) for request in stay if id(request) not in gone} - {0}
        self._most_tokens = int(scheduler.max_num_scheduled_tokens)
        self._most_inputs = int(scheduler.scheduler_config.max_num_batched_tokens)
        self._draft_slots = compat.draft_slots(scheduler)
        self._speculates = bool(scheduler.num_spec_tokens)
        self._pad = int(scheduler.num_spec_tokens) if compat.pads_starts(scheduler) else 0
        self._prefills = False
        self._inputs = 0
        self.tokens = self.largest = 0

    def take_running(self, run: Sequence[Request], tokens: SlotArray, planned: SlotArray) -> list[int]:
        """Count the running requests' tokens; returns the drafts that each verifies, empty without speculation."""
        drafts: list[int] = []
        if self._speculates:
            # A request may have fewer drafts than planned; what they leave must not go to the last chunk.
            drafts = [min(len(one.spec_token_ids), most) for one, most in zip(run, planned.tolist(), strict=True)]
            tokens = np.where(planned > 0, tokens - planned + np.array(drafts, dtype=np.int64), tokens)
            self._prefills = any(request.is_prefill_chunk for request in run)
        if len(run):
            self.tokens = min(int(tokens.sum()), self._most_tokens)
            self.largest = int(tokens.max())
            self._inputs = self.tokens + self._draft_slots * len(run)
        return drafts

    def with_one_left(self, chosen: Selection) -> int:
        """A budget of which a token is left behind the running requests, each taking no more than ``largest``."""
        wanted = [compat.wanted_tokens(request) for request in chosen.run]
        if chosen.drafts:
            unused = zip(wanted, chosen.run, chosen.drafts, strict=True)
            wanted = [most - len(request.spec_token_ids) + drafts for most, request, drafts in unused]
        taken = sum(min(most, self.largest) for most in wanted)
        return min(max(self.tokens, taken + 1), self._most_tokens)

    def takes_start(self, request: Request, count: int) -> bool:
        """Whether a waiting request may start with ``count`` tokens beside the ones before; counts it if so."""
        adapter = compat.adapter_of(request)
        is_new = bool(self._most_adapters and adapter and adapter not in self._adapters)
        if is_new and len(self._adapters) >= self._most_adapters:
            return False
        if self._pad and not self._prefills and count == 1:
            count += self._pad  # vLLM pads a start of one token, or leaves it out
        inputs = self._inputs + count + self._draft_slots
        has_slot = id(request) in self._sessions
        if (self._slots <= 0 and not has_slot) or self.tokens + count > self._most_tokens or inputs > self._most_inputs:
            return False
        self._slots -= not has_slot
        if is_new:
            self._adapters.add(adapter)
        self.tokens += count
        self.largest = max(self.largest, count)
        self._inputs = inputs
        return True


def _loads_that_fit(
    scheduler: Scheduler, plan: StepPlan, book: RequestBook, needs: KVNeeds, loads: Sequence[Tracked]
) -> tuple[list[Request], list[Request]]:
    """Loads whose blocks are free beside the plan's and those of prompts in progress, and planned ones that do not fit.

    vLLM ends its scan at the first that does not fit. Requests that the plan would start come first; in this step only
    their loads begin.
    """
    if not loads or compat.most_running(scheduler) <= len(scheduler.running):
        return [], []
    free, reserves = needs.unreserved_blocks()
    rows = book.table.rows
    to_load = {tracked.slot for tracked in loads}
    for slot, tokens in zip(plan.slots.tolist(), plan.tokens.tolist(), strict=True):
        row = rows[slot]
        most = int(row["prompt_tokens"] + row["output_tokens"])
        in_progress = row["computed_tokens"] > 0 and most - row["computed_tokens"] > 1
        if slot in to_load or (reserves and in_progress):
            continue
        whole = tokens if row["running"] else most
        free -= -(-int(whole) // needs.block_size) + 1 + int(row["fixed_blocks"]) * (not row["running"])
    fitting, planned = [], set(plan.slots.tolist())
    wished = sorted(loads, key=lambda one: one.slot not in planned)
    for tracked in wished:
        free -= needs.load_blocks(tracked.request)
        if free < 0:
            break
        fitting.append(tracked.request)
    unfit = [tracked.request for tracked in wished[len(fitting) :] if tracked.slot in planned]
    return fitting, unfit


@dataclass(slots=True)
class HiddenRequests:
    """How many requests :class:`SteeredStep` has set aside: what vLLM computes from its lists is to count them too."""

    running: int = 0
    waiting: int = 0


class SteeredStep:
    """``with SteeredStep(...):`` ``schedule()`` makes the selected batch within the block.

    Entering changes vLLM's lists last, when nothing of ours can fail any more; drafts that it took from requests come
    back when something fails before that. Leaving puts them back; when something
    of ours fails there, they are put together again from the requests' own states, and the fault is told to
    ``on_fault``. Afterwards the selection says who really started and who was preempted.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        chosen: Selection,
        now_s: float,
        hidden: HiddenRequests,
        on_fault: Callable[[str, Exception], None],
    ) -> None:
        self._scheduler = scheduler
        self._chosen = chosen
        self._now_s = now_s
        self._hidden = hidden
        self._on_fault = on_fault

    def __enter__(self) -> None:
        scheduler, chosen = self._scheduler, self._chosen
        self._first_name = compat.first_queue_name(scheduler)
        self._limit_name = compat.active_limit_name(scheduler)
        for request in chosen.preempt:
            compat.preempt(scheduler, request, self._now_s)
        self._running, self._waiting = scheduler.running, scheduler.waiting
        self._first = getattr(scheduler, self._first_name)
        self._budget, self._limit = scheduler.max_num_scheduled_tokens, getattr(scheduler, self._limit_name)
        num_held = len(self._running) - len(chosen.run)
        drafting = [request for request in self._running if request.spec_token_ids] if scheduler.num_spec_tokens else []
        before = [request.spec_token_ids for request in drafting]
        try:
            if scheduler.num_spec_tokens:
                self._limit_drafts(drafting)
            self._change_lists(num_held)
        except Exception:
            for request, drafts in zip(drafting, before, strict=True):
                request.spec_token_ids = drafts
            raise

    def _limit_drafts(self, drafting: Sequence[Request]) -> None:
        """Leave the drafts that are to be verified: as planned for those that run, real ones for those that wait."""
        chosen = self._chosen
        runs = set(map(id, chosen.run))
        for request, most in zip(chosen.run, chosen.drafts, strict=False):
            compat.keep_drafts(request, most)
        for request in drafting:
            if id(request) not in runs:
                compat.drop_placeholders(request)

    def _change_lists(self, num_held: int) -> None:
        """Show vLLM what is chosen, and nothing else."""
        scheduler, chosen = self._scheduler, self._chosen
        starting, nobody = compat.queue_of((*chosen.loads, *chosen.start)), compat.queue_of(())
        num_hidden = len(self._first) + len(self._waiting) - len(starting)
        self._threshold = compat.cap_prefills(scheduler, chosen.most_tokens_each)
        self._hidden.running, self._hidden.waiting = num_held, num_hidden
        scheduler.running = list(chosen.run)
        setattr(scheduler, self._first_name, starting)
        scheduler.waiting = nobody
        scheduler.max_num_scheduled_tokens = min(chosen.budget, self._budget)
        setattr(scheduler, self._limit_name, self._limit - num_held)

    def __exit__(self, *_: object) -> None:
        scheduler = self._scheduler
        self._hidden.running = self._hidden.waiting = 0
        scheduler.scheduler_config.long_prefill_token_threshold = self._threshold
        setattr(scheduler, self._limit_name, self._limit)
        scheduler.max_num_scheduled_tokens = self._budget
        after, mixed = scheduler.running, (*getattr(scheduler, self._first_name), *scheduler.waiting)
        setattr(scheduler, self._first_name, self._first)
        scheduler.waiting = self._waiting
        try:
            self._put_back(after, mixed)
        except Exception as error:
            self._put_together(after, mixed)
            self._on_fault("steer", error)

    def _put_back(self, after: list[Request], mixed: Sequence[Request]) -> None:
        """The running list and the queues as stock order would have them."""
        chosen, run, kept = self._chosen, self._chosen.run, self._running
        started = _behind(after, run)
        if len(after) - len(started) < len(run):  # vLLM preempted some of those that were to run
            still = {id(request) for request in after}
            gone = {id(request) for request in run if id(request) not in still}
            kept = [request for request in kept if id(request) not in gone]
            lost = [request for request in mixed if id(request) in gone]
            for request in reversed(lost):
                self._waiting.prepend_request(request)
            chosen.preempted += lost
        self._scheduler.running = [*kept, *started]
        chosen.started = started
        chosen.preempted += chosen.preempt
        chosen.loading = [request for request in (*chosen.loads, *chosen.start) if compat.loads_kv(request)]
        moved = [*started, *chosen.loading]
        if moved:
            for queue in (self._first, self._waiting):
                _remove(queue, moved)
            for request in chosen.loading:
                self._first.add_request(request)

    def _put_together(self, after: list[Request], mixed: Sequence[Request]) -> None:
        """Every request back where its own state says it belongs, in stock order as far as that is known."""
        inside = list(dict.fromkeys((*self._running, *after)))
        self._scheduler.running = [request for request in inside if request.status.name == "RUNNING"]
        first, waiting = list(self._first), list(self._waiting)
        known = {id(request) for request in (*first, *waiting)}
        lost = [request for request in (*mixed, *inside) if id(request) not in known]
        for queue, members in ((self._first, first), (self._waiting, [*dict.fromkeys(lost), *waiting])):
            queue.clear()
            for request in members:
                if request.status.name in ("WAITING", "PREEMPTED") or request.status.name.startswith("WAITING_FOR"):
                    queue.add_request(request)


def _remove(queue: RequestQueue, moved: Sequence[Request]) -> None:
    """Take those of ``moved`` that are in a queue out of it; vLLM's call for several goes through the whole queue."""
    if not queue:
        return
    if len(moved) > FEW:
        queue.remove_requests(moved)
        return
    for request in moved:
        place = _place_in(queue, request)
        if place is not None:
            del queue[place]
            continue
        with suppress(ValueError):  # it is in the other queue
            queue.remove_request(request)


def _place_in(queue: RequestQueue, request: Request) -> int | None:
    """Where a request is in a queue that is a deque by arrival; ``None`` where bisection does not find it.

    A deep queue is not scanned: that would touch each of its requests.
    """
    if not isinstance(queue, deque):
        return None
    place = bisect_left(queue, request.arrival_time, key=lambda one: one.arrival_time)
    while place < len(queue) and queue[place] is not request:
        if queue[place].arrival_time != request.arrival_time:
            return None
        place += 1
    return place if place < len(queue) else None


def _behind(after: list[Request], run: list[Request]) -> list[Request]:
    """Requests that vLLM has appended behind those that were to run; it takes preempted ones off their end."""
    if after[: len(run)] == run:
        return after[len(run) :]
    number = 0
    while number < len(after) and number < len(run) and after[number] is run[number]:
        number += 1
    return after[number:]
