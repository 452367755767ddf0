"""How much of each waiting prompt is computed already: in the engine's prefix cache, or in a KV connector's tier.

A look-up takes time, so a plan makes a bounded number of them: requests that came since the
last plan first, then some old answers anew, since the cache's content changes with every step. vLLM looks again
when it starts the request; a stale answer only makes a plan's chunk a little too long or too short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from slos_serve.core.request import RequestArray
from slos_serve.vllm_plugin import compat, compat_kv
from slos_serve.vllm_plugin.tracked import Tracked

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

# Look-ups of one plan: of requests that were never looked up, and of those that were.
FIRST_LOOKUPS, REPEATED_LOOKUPS = 16, 4


class PrefixHits:
    """Look-ups for the waiting requests of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._new: deque[Tracked] = deque()
        self._known: deque[Tracked] = deque()
        self._asked: set[int] = set()
        self._loads: dict[int, Tracked] = {}
        self._within: dict[int, Tracked] = {}
        caches = getattr(scheduler.kv_cache_manager, "enable_caching", False)
        self._local = compat_kv.LocalHits(scheduler)
        self._needed = bool(caches or scheduler.connector is not None)

    def waits(self, several: Sequence[Tracked]) -> None:
        """Requests that wait to start from nothing: look them up in the next plans."""
        if self._needed:
            for tracked in several:
                self._asked.discard(tracked.slot)
                self._new.append(tracked)

    def forget(self, tracked: Tracked) -> None:
        """The request has started or left."""
        self._asked.discard(tracked.slot)
        self._loads.pop(tracked.slot, None)
        self._within.pop(tracked.slot, None)

    def loads(self) -> list[Tracked]:
        """Requests whose KV a connector would load between steps: vLLM is to see them, they take no tokens."""
        return _not_begun(self._loads)

    def loads_within_step(self) -> list[Tracked]:
        """Requests whose KV a connector would load within the step that starts them."""
        return _not_begun(self._within)

    def is_unasked(self, tracked: Tracked) -> bool:
        """Whether a connector must be asked before the request can be planned."""
        if self._scheduler.connector is None or tracked.request.num_computed_tokens:
            return False
        return tracked.slot not in self._asked or tracked.slot in self._loads

    def refresh(self, rows: RequestArray, waiting: Container[int]) -> None:
        """Look up some of the requests in ``waiting`` (slots) and write ``cached_tokens`` into their rows."""
        if not self._needed:
            return
        for queue, most in ((self._new, FIRST_LOOKUPS), (self._known, REPEATED_LOOKUPS)):
            for _ in range(min(most, len(queue))):
                tracked = queue.popleft()
                if tracked.slot not in waiting or tracked.request.num_computed_tokens:
                    continue
                self._look_up(tracked, rows)
                self._known.append(tracked)

    def _look_up(self, tracked: Tracked, rows: RequestArray) -> None:
        """Write what is cached of one request."""
        scheduler, request = self._scheduler, tracked.request
        hit = self._local.find(request, tracked.local_hit)
        if hit == tracked.local_hit and tracked.slot in self._asked and scheduler.connector is None:
            return  # the row says so already
        tracked.local_hit = hit
        cached, shared = hit
        rows["fixed_blocks"][tracked.slot] = tracked.fixed_blocks - shared // int(scheduler.block_size)
        self._loads.pop(tracked.slot, None)
        self._within.pop(tracked.slot, None)
        tracked.external_tokens = 0
        if scheduler.connector is not None and not request.skip_reading_prefix_cache:
            external, asynchronous = compat_kv.external_hit(scheduler, request, cached)
            if external is None:  # the connector does not know yet
                self._asked.discard(tracked.slot)
                return
            if external > 0:
                (self._loads if asynchronous else self._within)[tracked.slot] = tracked
            tracked.external_tokens = external
            cached += external
        self._asked.add(tracked.slot)
        rows["cached_tokens"][tracked.slot] = min(cached, request.num_tokens - 1)


def _not_begun(found: dict[int, Tracked]) -> list[Tracked]:
    """Those that have not started or begun to load; forgets the others."""
    for tracked in list(found.values()):
        if tracked.request.num_computed_tokens or not compat.may_start(tracked.request):
            del found[tracked.slot]
    return list(found.values())
