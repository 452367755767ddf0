"""Making stock ``schedule()`` follow a step plan: by order and budget, never by copying it.

A plan becomes a :class:`Selection` first: the planned requests that vLLM would accept now, within every limit that
vLLM asserts. For one step the running list holds only the selected running requests in the plan's order, the queue that
vLLM empties first holds only those that start, and the token budget is their sum. All other requests are set aside and
put back right after, in the engine's own order, whatever happened in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slos_serve.core.plan import StepPlan
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.kv_needs import KVNeeds
from slos_serve.vllm_plugin.request_book import RequestBook
from slos_serve.vllm_plugin.tracked import Tracked

if TYPE_CHECKING:
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


@dataclass(slots=True)
class Selection:
    """One step as vLLM is to make it.

    Attributes:
        run: running requests that get tokens, in order.
        start: waiting requests that start, in order, behind the running ones.
        preempt: running requests that give their KV back before the step.
        loads: waiting requests whose KV a connector is to load; they take no tokens.
        budget: tokens of the step.
    """

    run: list[Request] = field(default_factory=list)
    start: list[Request] = field(default_factory=list)
    preempt: list[Request] = field(default_factory=list)
    loads: list[Request] = field(default_factory=list)
    budget: int = 0


def select(
    scheduler: Scheduler, plan: StepPlan, book: RequestBook, needs: KVNeeds, loads: Sequence[Tracked]
) -> Selection:
    """What of a plan vLLM would accept now.

    Raises:
        KeyError: the plan names a slot that holds no request.
    """
    preempt = [book.by_slot[slot].request for slot in plan.preempt.tolist()]
    planned = [book.by_slot[slot].request for slot in plan.slots.tolist()]
    tokens = plan.tokens.tolist()
    drafts = plan.draft_tokens.tolist() or [0] * len(planned)
    running = {id(request) for request in scheduler.running}
    if not all(id(request) in running and compat.can_preempt(scheduler, request) for request in preempt):
        # Blocks that stay fenced help nobody in this step: no preemption, and nobody starts on the strength of it.
        preempt = []
        planned = [request if id(request) in running else None for request in planned]
    gone = {id(request) for request in preempt}
    chosen = Selection(preempt=preempt)
    limits = _Room(scheduler, gone)
    for request, count, draft in zip(planned, tokens, drafts, strict=True):
        if request is None or id(request) in gone:
            continue
        if id(request) in running:
            if compat.can_run_now(scheduler, request):
                compat.keep_drafts(request, draft)
                chosen.run.append(request)
                # A request may have fewer drafts than planned; what they leave must not go to the last chunk.
                limits.take_running(request, count - draft + len(request.spec_token_ids) if draft else count)
        elif compat.may_start(request) and limits.takes_start(request, count):
            chosen.start.append(request)
    chosen.budget = limits.tokens
    chosen.loads = _loads_that_fit(scheduler, plan, book, needs, loads)
    return chosen


class _Room:
    """The limits that vLLM asserts, as a selection fills them."""

    def __init__(self, scheduler: Scheduler, preempted: set[int]) -> None:
        self._scheduler = scheduler
        stay = [request for request in scheduler.running if id(request) not in preempted]
        self._slots = compat.most_running(scheduler) - len(stay)
        self._most_adapters = compat.most_adapters(scheduler)
        self._adapters = {compat.adapter_of(request) for request in stay} - {0} if self._most_adapters else set()
        self._most_tokens = int(scheduler.max_num_scheduled_tokens)
        self._most_inputs = int(scheduler.scheduler_config.max_num_batched_tokens)
        self._draft_slots = compat.draft_slots(scheduler)
        self._pad = int(scheduler.num_spec_tokens) if compat.pads_starts(scheduler) else 0
        self._prefills = False
        self._inputs = 0
        self.tokens = 0

    def take_running(self, request: Request, count: int) -> None:
        """Count a running request's tokens."""
        self._prefills |= bool(request.is_prefill_chunk)
        self.tokens = min(self.tokens + count, self._most_tokens)
        self._inputs += count + self._draft_slots

    def takes_start(self, request: Request, count: int) -> bool:
        """Whether a waiting request may start with ``count`` tokens beside the ones before; counts it if so."""
        adapter = compat.adapter_of(request)
        is_new = bool(self._most_adapters and adapter and adapter not in self._adapters)
        if is_new and len(self._adapters) >= self._most_adapters:
            return False
        if self._pad and not self._prefills and count == 1:
            count += self._pad  # vLLM pads a start of one token, or leaves it out
        inputs = self._inputs + count + self._draft_slots
        if self._slots <= 0 or self.tokens + count > self._most_tokens or inputs > self._most_inputs:
            return False
        self._slots -= 1
        self._adapters |= {adapter} - {0} if self._most_adapters else set()
        self.tokens += count
        self._inputs = inputs
        return True


def _loads_that_fit(
    scheduler: Scheduler, plan: StepPlan, book: RequestBook, needs: KVNeeds, loads: Sequence[Tracked]
) -> list[Request]:
    """Loads whose blocks are free beside those of the plan: vLLM ends its scan at the first that does not fit."""
    if not loads or compat.most_running(scheduler) <= len(scheduler.running):
        return []
    free = needs.free_blocks()
    rows = book.table.rows
    for slot, tokens in zip(plan.slots.tolist(), plan.tokens.tolist(), strict=True):
        whole = tokens if rows["running"][slot] else rows["prompt_tokens"][slot] + rows["output_tokens"][slot]
        free -= -(-int(whole) // needs.block_size) + 1 + int(rows["fixed_blocks"][slot]) * (not rows["running"][slot])
    fitting = []
    for tracked in loads:
        free -= needs.load_blocks(tracked.request)
        if free < 0:
            break
        fitting.append(tracked.request)
    return fitting


@contextmanager
def steered(scheduler: Scheduler, chosen: Selection, now_s: float, hidden: HiddenRequests) -> Iterator[None]:
    """Within the block, ``schedule()`` makes the selected batch."""
    for request in chosen.preempt:
        compat.preempt(scheduler, request, now_s)
    first_name = compat.first_queue_name(scheduler)
    limit_name = compat.active_limit_name(scheduler)
    first, waiting = getattr(scheduler, first_name), scheduler.waiting
    budget, limit = scheduler.max_num_scheduled_tokens, getattr(scheduler, limit_name)
    running = list(scheduler.running)
    runs = {id(request) for request in chosen.run}
    held = [request for request in running if id(request) not in runs]
    for request in held:
        compat.drop_placeholders(request)
    scheduler.running = list(chosen.run)
    setattr(scheduler, first_name, compat.queue_of((*chosen.loads, *chosen.start)))
    scheduler.waiting = compat.queue_of(())
    scheduler.max_num_scheduled_tokens = min(chosen.budget, budget)
    setattr(scheduler, limit_name, limit - len(held))
    shown = len(chosen.loads) + len(chosen.start)
    hidden.running, hidden.waiting = len(held), len(first) + len(waiting) - shown
    try:
        yield
    finally:
        hidden.running = hidden.waiting = 0
        setattr(scheduler, limit_name, limit)
        scheduler.max_num_scheduled_tokens = budget
        preempted = [request for request in scheduler.waiting if id(request) in runs]
        after = scheduler.running
        scheduler.running = _back_in_order(running, held, after)
        setattr(scheduler, first_name, first)
        scheduler.waiting = waiting
        _take_out(first, waiting, chosen, {id(request) for request in after})
        for request in reversed(preempted):
            waiting.prepend_request(request)


@dataclass(slots=True)
class HiddenRequests:
    """How many requests :func:`steered` has set aside: what vLLM computes from its lists is to count them too."""

    running: int = 0
    waiting: int = 0


def _back_in_order(before: list[Request], held: list[Request], after: list[Request]) -> list[Request]:
    """The running list as stock order would have it: old ones as they stood, new ones behind."""
    still = {id(request) for request in held} | {id(request) for request in after}
    old = {id(request) for request in before}
    kept = [request for request in before if id(request) in still]
    return kept + [request for request in after if id(request) not in old]


def _take_out(first: RequestQueue, waiting: RequestQueue, chosen: Selection, running: set[int]) -> None:
    """Take those that started out of the queues they stood in, and move loads that began to the first queue."""
    started = [request for request in chosen.start if id(request) in running]
    loading = [request for request in (*chosen.loads, *chosen.start) if compat.loads_kv(request)]
    if started or loading:
        gone = [*started, *loading]
        for queue in (first, waiting):
            if queue:
                queue.remove_requests(gone)
        for request in loading:
            first.add_request(request)
