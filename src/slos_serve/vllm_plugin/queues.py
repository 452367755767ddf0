"""All waiting requests of vLLM's scheduler: who may start, and who waits for something other than a turn.

vLLM keeps waiting requests in two queues (``kv_holding_waiting`` and ``waiting`` since 0.31, ``skipped_waiting`` and
``waiting`` before). Requests in them may wait for a grammar, for remote KV or for streaming input; vLLM notices that
one is ready only while it scans the queues with budget left. :meth:`Queues.look` applies the same rule before the plan,
so that a ready request is planned like any other.

The queues may be deep, so they are not scanned at every step: requests that come, start, are preempted or leave are
told, after steps in stock order too. The queues are scanned anew when such a step preempted somebody, and when the
lengths do not agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.request import SlotArray
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.request_book import RequestBook
from slos_serve.vllm_plugin.tracked import Tracked

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


class Queues:
    """The waiting side of one scheduler.

    Attributes:
        startable: by slot, requests that could start now: preempted ones first, then by arrival.
        blocked: by slot, requests that wait for something other than a turn.
        scans: how often the queues were scanned as a whole.
    """

    def __init__(self, scheduler: Scheduler, book: RequestBook) -> None:
        self.startable: dict[int, Tracked] = {}
        self.blocked: dict[int, Tracked] = {}
        self.scans = 0
        self._scheduler = scheduler
        self._book = book
        self._first_name = compat.first_queue_name(scheduler)
        self._stale = True
        self._slots: SlotArray | None = None

    def __len__(self) -> int:
        return len(self.startable) + len(self.blocked)

    def changed(self) -> None:
        """The queues may be any now: scan them before the next plan."""
        self._stale = True

    def entered(self, tracked: Tracked) -> None:
        """A request waits at the end of a queue."""
        if not compat.may_start(tracked.request):
            self.blocked[tracked.slot] = tracked
            return
        if self._slots is not None and tracked.slot not in self.startable:
            self._slots = np.append(self._slots, tracked.slot)
        self.startable[tracked.slot] = tracked

    def left(self, tracked: Tracked) -> None:
        """A request has started or ended."""
        if self.startable.pop(tracked.slot, None) is not None and self._slots is not None:
            self._slots = self._slots[self._slots != tracked.slot]
        self.blocked.pop(tracked.slot, None)

    def preempted(self, several: Iterable[Tracked]) -> None:
        """Requests wait again, ahead of all others."""
        several = list(several)
        self._book.sync_waiting(several)
        for tracked in several:
            place = self.startable if compat.may_start(tracked.request) else self.blocked
            place.pop(tracked.slot, None)
            if place is self.blocked:
                place[tracked.slot] = tracked
            else:
                self.startable = {tracked.slot: tracked, **self.startable}
        self._slots = None

    def look(self) -> SlotArray:
        """Promote what is ready; int64 slots of the requests that could start now."""
        scheduler = self._scheduler
        length = len(getattr(scheduler, self._first_name)) + len(scheduler.waiting)
        if self._stale or length != len(self):
            self._scan()
        for slot, tracked in list(self.blocked.items()):
            if self._is_ready(tracked):
                del self.blocked[slot]
                self.startable[slot] = tracked
                self._book.sync_waiting((tracked,))
                self._slots = None
        if self._slots is None:
            self._slots = np.fromiter(self.startable, dtype=np.int64, count=len(self.startable))
        return self._slots

    def _scan(self) -> None:
        self.scans += 1
        self._stale, self._slots = False, None
        self.startable, self.blocked = {}, {}
        waiting = [*getattr(self._scheduler, self._first_name), *self._scheduler.waiting]
        known = self._book.known_of(waiting)
        # Rows of those that only came are right already; deep queues consist of them.
        self._book.sync_waiting(
            [one for one in known if one.request.num_preemptions or one.request.num_computed_tokens]
        )
        for tracked in known:
            self.entered(tracked)

    def _is_ready(self, tracked: Tracked) -> bool:
        """Whether a request may start now, after vLLM's own promotion; a parked session has nothing to wait for."""
        request = tracked.request
        if compat.is_blocked(self._scheduler, request) and not compat.is_parked(request):
            compat.promote(self._scheduler, request)
        return compat.may_start(request)
