"""Making stock ``schedule()`` follow a step plan: by order and budget, never by copying it.

For one step the running list holds only who is to run, in the plan's order; the waiting queue holds only who is to
start; the token budget is the plan's sum. Everyone else is set aside and put back right after, in the engine's own
order, whatever happened in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from slos_serve.core.plan import StepPlan
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.request_book import RequestBook

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.request import Request


@contextmanager
def steered(scheduler: AsyncScheduler, plan: StepPlan, book: RequestBook, now_s: float) -> Iterator[None]:
    """Within the block, ``AsyncScheduler.schedule`` makes the planned batch."""
    for slot in plan.preempt:
        compat.preempt(scheduler, book.by_slot[int(slot)].request, now_s)
    planned = [book.by_slot[int(slot)].request for slot in plan.slots]
    running_before = list(scheduler.running)
    is_running = {id(request) for request in running_before}
    run_now = [request for request in planned if id(request) in is_running]
    start_now = [request for request in planned if id(request) not in is_running]
    chosen = {id(request) for request in planned}
    held = [request for request in running_before if id(request) not in chosen]
    for request, draft in zip(planned, plan.draft_tokens.tolist(), strict=False):
        compat.keep_drafts(request, draft)
    for request in held:
        # Draft placeholders of a step that does not happen would be verified against the wrong position later.
        request.spec_token_ids = []

    waiting_before = list(scheduler.waiting)
    queue_before, budget_before = scheduler.waiting, scheduler.max_num_scheduled_tokens
    # Requests that wait for something other than a turn stay in sight, so that vLLM can see that they are ready.
    room = scheduler.max_num_running_reqs - len(running_before) - len(start_now)
    blocked = [request for request in waiting_before if not compat.is_plannable(request)][: max(room, 0)]
    in_sight = {id(request) for request in (*blocked, *start_now)}
    aside = [request for request in waiting_before if id(request) not in in_sight]

    scheduler.running = run_now
    scheduler.waiting = compat.queue_of((*blocked, *start_now))
    # A request may have fewer drafts than planned; what they leave must not go to the chunk that ends the batch.
    drafts = sum(len(request.spec_token_ids) for request in run_now) - int(plan.draft_tokens.sum())
    scheduler.max_num_scheduled_tokens = min(plan.num_tokens + drafts, budget_before)
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = budget_before
        scheduler.running = _back_in_order(running_before, held, scheduler.running)
        left = list(scheduler.waiting)
        scheduler.waiting = queue_before
        queue_before.remove_requests(waiting_before)
        for request in _waiting_order(waiting_before, left, aside):
            queue_before.add_request(request)


def _back_in_order(before: list[Request], held: list[Request], after: list[Request]) -> list[Request]:
    """The running list as stock order would have it: old ones as they stood, new ones behind."""
    still = {id(request) for request in held} | {id(request) for request in after}
    old = {id(request) for request in before}
    kept = [request for request in before if id(request) in still]
    return kept + [request for request in after if id(request) not in old]


def _waiting_order(before: list[Request], left: list[Request], aside: list[Request]) -> list[Request]:
    """The waiting queue as stock order would have it: newly preempted ones first, then as they stood."""
    still = {id(request) for request in left} | {id(request) for request in aside}
    old = {id(request) for request in before}
    return [request for request in left if id(request) not in old] + [
        request for request in before if id(request) in still
    ]
