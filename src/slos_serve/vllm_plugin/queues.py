"""All waiting requests of vLLM's scheduler: who may start, who waits for something else, and bringing the two together.

vLLM keeps waiting requests in two queues (``kv_holding_waiting`` and ``waiting`` since 0.31, ``skipped_waiting`` and
``waiting`` before). Requests in them may wait for a grammar, for remote KV or for streaming input; vLLM notices that
one is ready only while it scans the queue with budget left. :meth:`Queues.promote_ready` applies the same rule before
the plan, so that a ready request is planned like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slos_serve.vllm_plugin import compat

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


class Queues:
    """The waiting side of one scheduler.

    Attributes:
        startable: requests that could start now, in vLLM's order (first queue before ``waiting``).
        blocked: requests that wait for something other than a turn.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._first_name = compat.first_queue_name(scheduler)
        self.startable: list[Request] = []
        self.blocked: list[Request] = []
        self._seen_length = -1

    def changed(self) -> None:
        """Somebody came, started, was preempted or left: look at the queues anew."""
        self._seen_length = -1

    def look(self) -> bool:
        """Promote what is ready and bring the two lists up to date; whether they were made anew."""
        scheduler = self._scheduler
        queues = (getattr(scheduler, self._first_name), scheduler.waiting)
        length = len(queues[0]) + len(queues[1])
        if length == self._seen_length and not any(self._is_ready(request) for request in self.blocked):
            return False
        self.startable, self.blocked = [], []
        for queue in queues:
            ready = compat.startable(queue)
            self.startable += ready
            if len(ready) < len(queue):
                for request in queue:
                    if not compat.may_start(request):
                        (self.startable if self._is_ready(request) else self.blocked).append(request)
        self._seen_length = length
        return True

    def _is_ready(self, request: Request) -> bool:
        """Whether a request may start now, after vLLM's own promotion; a parked session has nothing to wait for."""
        if compat.is_blocked(self._scheduler, request) and not compat.is_parked(request):
            compat.promote(self._scheduler, request)
        return compat.may_start(request)
