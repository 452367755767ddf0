"""Makes a ticket of a request: its class and promises as the engine's scheduler will see them.

The same environment is read as by the scheduler (classes, profile, margin), so that router and replica compute the same
deadlines.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from slos_serve.core.request import share_of
from slos_serve.core.slo import SLOClass, WhenFull
from slos_serve.core.trust import DeniedError
from slos_serve.files.class_file import CUSTOM_CLASS
from slos_serve.ray_serve.fleet_tasks import FleetTasks
from slos_serve.ray_serve.prompts import PromptCounter
from slos_serve.ray_serve.ticket import Ticket
from slos_serve.routing.router import RoutingRequest
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.gate import allowed_class
from slos_serve.vllm_plugin.handed import with_handed
from slos_serve.vllm_plugin.seal import Seal, seal_of
from slos_serve.vllm_plugin.slo_args import MAX_SESSION_CHARS, SESSION_HEADER, from_extra_args

# JSON carries whole numbers of 53 bits exactly.
TICKET_BITS = 53


class TicketOffice:
    """Tickets for the requests of one model.

    Args:
        settings: classes, profile and margins, as the replicas' schedulers have them.
        prompts: counts prompt tokens.
        max_model_len: longest context of the model.
        clock_s: the router's clock.

    Attributes:
        tasks: the tasks of its clients.
    """

    def __init__(
        self,
        settings: PluginConfig,
        prompts: PromptCounter,
        max_model_len: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._prompts = prompts
        self._max_model_len = max_model_len
        self._clock_s = clock_s
        self._seal: Seal | None = None
        if settings.trust.knows_tenants:
            self._seal = seal_of(os.environ, may_make=False)
        self.tasks = FleetTasks(settings)
        self._indices = {slo_class.name: index for index, slo_class in enumerate(settings.classes)}

    def now_s(self) -> float:
        """The router's clock."""
        return self._clock_s()

    def ticket(self, body: Any, session: str | None = None, arrival_s: float | None = None) -> Ticket:
        """The ticket of an OpenAI request. Safe to be called from several threads.

        A call of a task begins here; the body takes its due time along to the replica.

        Args:
            body: the parsed request, headers merged into its ``vllm_xargs`` as the middleware does.
            session: from the header, for a request whose body was left as it came.
            arrival_s: when it came; ``None`` for now.

        Raises:
            InvalidFieldError: an SLO field cannot be used.
        """
        arrival_s = self._clock_s() if arrival_s is None else arrival_s
        asked = from_extra_args(getattr(body, "vllm_xargs", None))
        tenant = None if self._seal is None else self._seal.opened(asked.tenant)
        try:
            slo_class = allowed_class(self._settings.trust, self._settings.classes, asked, tenant)
        except DeniedError:
            slo_class = None  # it came around the middleware: its replica's scheduler promises nothing either
        prompt_tokens, class_index = self._prompts.prompt_tokens(body), self._index(slo_class)
        unpromised = RoutingRequest(
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens,
            max_tokens=self._max_tokens(body, prompt_tokens),
            class_index=class_index,
            share=share_of(class_index, len(self._indices) + 2, self._settings.trust.place(tenant)),
            hint_tokens=asked.expected_tokens or 0,
            reject_when_full=slo_class is not None and slo_class.when_full is not WhenFull.BEST_EFFORT,
            ticket=random.getrandbits(TICKET_BITS) | 1,
            binding=True,
        )
        promises = () if slo_class is None else slo_class.promises
        first, *weaker = [self._with_promise(unpromised, one) for one in promises] or [unpromised]
        ticket = Ticket(
            first,
            weaker=tuple(weaker),
            ttft_margin_s=self._settings.planner.ttft_margin_s,
            slo_class=None if slo_class is None else slo_class.name,
            session=asked.session_id or session,
            last_round=asked.last_round,
            refused_status=503 if slo_class is not None and slo_class.when_full is WhenFull.REJECT_503 else 429,
        )
        self.tasks.begin(ticket, slo_class, tenant)
        handed = with_handed(getattr(body, "vllm_xargs", None), ticket.call, arrival_s)
        if handed is not None:
            body.vllm_xargs = handed
        return ticket

    def class_name(self, class_index: int) -> str:
        """The class that an index of :attr:`RoutingRequest.class_index` stands for."""
        return next((name for name, index in self._indices.items() if index == class_index), CUSTOM_CLASS)

    def _with_promise(self, request: RoutingRequest, slo_class: SLOClass) -> RoutingRequest:
        """The request with a class's weight and, where there is a profile to reckon with, its promise."""
        request = replace(request, weight=max(slo_class.weight, 1e-6))
        if slo_class.best_effort or self._settings.profile is None:
            return request
        zero_load_s = self._settings.profile.model.zero_load_s(request.prompt_tokens)
        slo, counts_from_s = slo_class.slo, request.arrival_s - self._settings.planner.ttft_margin_s
        return replace(
            request,
            ttft_due_s=counts_from_s + slo.ttft_s(zero_load_s),
            tpot_s=slo.tpot_s,
            answer_due_s=counts_from_s + slo.e2e_s,
        )

    def _index(self, slo_class: SLOClass | None) -> int:
        """As the scheduler numbers them: the file's classes, one for custom numbers, one for none."""
        if slo_class is None or slo_class.best_effort:
            return len(self._indices) + 1
        return self._indices.get(slo_class.name, len(self._indices))

    def _max_tokens(self, body: Any, prompt_tokens: int) -> int:
        room = max(self._max_model_len - prompt_tokens, 1)
        for field in ("max_completion_tokens", "max_tokens"):
            given = getattr(body, field, None)
            if isinstance(given, int) and given > 0:
                return min(given, room)
        return room


def session_of(headers: Any) -> str | None:
    """The session that a request's headers name; ``None`` without one, and for a name longer than bodies may have."""
    found = headers.get(SESSION_HEADER)
    return found if found and len(found) <= MAX_SESSION_CHARS else None
