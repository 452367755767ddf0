"""The tasks of a fleet, as its ingress keeps them: one book, whichever replicas serve the calls.

Tickets are made in several threads, so every question takes a lock.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from slos_serve.core.slo import SLOClass
from slos_serve.core.tasks import task_of
from slos_serve.core.verdict import Verdict
from slos_serve.perf.tasks import CallAsked, TaskBook, TaskEnded, TaskKey
from slos_serve.ray_serve.ticket import Ticket
from slos_serve.vllm_plugin.config import PluginConfig


class FleetTasks:
    """See the module.

    Args:
        settings: margin and profile; without a profile no call is given a time.
    """

    def __init__(self, settings: PluginConfig) -> None:
        self._book = None if settings.profile is None else TaskBook(settings.profile.model.zero_load_s)
        self._margin_s = settings.planner.ttft_margin_s
        self._lock = threading.Lock()
        self._ended: list[TaskEnded] = []

    def begin(self, ticket: Ticket, slo_class: SLOClass | None, tenant: str | None) -> None:
        """A call came: write when it is due, and its weight, into its ticket."""
        task, asked = task_of(slo_class), ticket.asked
        if task is None or ticket.session is None or self._book is None:
            return
        wanted = CallAsked(
            task,
            asked.class_index,
            asked.arrival_s,
            asked.prompt_tokens,
            asked.max_tokens,
            asked.hint_tokens,
            ticket.last_round,
        )
        with self._lock:
            ticket.call, ended = self._book.begin(TaskKey(tenant or "", ticket.session), wanted)
            self._ended += ended
        due_s = min(asked.answer_due_s, ticket.call.due_s - self._margin_s)
        ticket.asked = replace(asked, answer_due_s=due_s, weight=asked.weight * ticket.call.weight)

    def refused(self, ticket: Ticket) -> None:
        """No replica serves the call, and its client knows."""
        if ticket.call is not None and self._book is not None:
            with self._lock:
                self._book.withdraw(ticket.call)

    def left(self, ticket: Ticket, now_s: float, *, finished: bool) -> None:
        """A call ended; ``finished``: with a whole answer."""
        if ticket.call is None or self._book is None:
            return
        promised = ticket.decision is not None and ticket.decision.verdict is Verdict.ADMITTED
        with self._lock:
            ended = self._book.call_ended(
                ticket.call,
                now_s,
                ticket.output_tokens,
                finished=finished,
                promised=promised,
                last=ticket.last_round,
            )
            self._ended += [] if ended is None else [ended]

    def take_ended(self) -> list[TaskEnded]:
        """Tasks that ended since the last call."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended
