"""Answers whose heads wait: no promise fitted when their requests came, and the engine may still make one.

What ends early leaves room, and the engine asks again with each plan. Until a first token would be late, or the answer
begins, nothing is lost by a head that says how that went. The engine tells of such a promise when it makes it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from contextlib import suppress

from slos_serve.core.verdict import Verdict, Why
from slos_serve.vllm_plugin.front.judged import Judged
from slos_serve.vllm_plugin.front.mirror import Answer

# No head waits longer, whatever is promised: clients and proxies may not be patient.
MOST_HELD_S = 5.0


class OpenPromises:
    """Requests that may still be promised something before their clients are told. Used from one event loop, if any."""

    def __init__(self) -> None:
        self._by_ticket: dict[int, Judged] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, judged: Judged, ticket: int, request_id: str, *, alone: bool) -> None:
        """A request was promised nothing as it came; where several answers to it were asked for, none will be."""
        judged.open[ticket] = request_id
        if alone:
            self._by_ticket[ticket] = judged
        with suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()

    def close(self, judged: Judged) -> None:
        """Its client is being told: what the engine promises from now on is more than that."""
        for ticket in judged.open:
            self._by_ticket.pop(ticket, None)
        judged.open.clear()

    async def wait(self, judged: Judged, now_s: float) -> None:
        """Until all of it is promised, its last promise would be late, or ``MOST_HELD_S`` have passed."""
        left_s = min(max(judged.targets_s, default=0.0), MOST_HELD_S) - (now_s - judged.arrival_s)
        if judged.open and left_s > 0.0:
            with_timeout = asyncio.wait_for(judged.decided.wait(), left_s)
            await asyncio.gather(with_timeout, return_exceptions=True)

    def made(self, promised: Iterable[tuple[int, int]], note: Callable[[str, Verdict], None]) -> None:
        """The engine made promises; called by any thread.

        Args:
            promised: ticket and rank of each.
            note: called in the event loop with a request's id and what its client will be told.
        """
        ours = [(ticket, rank) for ticket, rank in promised if ticket in self._by_ticket]
        if ours and self._loop is None:
            self._take(ours, note)
        elif ours and self._loop is not None:
            self._loop.call_soon_threadsafe(self._take, ours, note)

    def _take(self, promised: list[tuple[int, int]], note: Callable[[str, Verdict], None]) -> None:
        for ticket, rank in promised:
            judged = self._by_ticket.pop(ticket, None)
            if judged is None:
                continue
            note(judged.open.pop(ticket), _verdict(rank))
            judged.late_rank = max(judged.late_rank, rank)
            if not judged.open:
                give(judged, Answer(_verdict(judged.late_rank), Why.FITS, rank=judged.late_rank))
                judged.decided.set()


def give(judged: Judged, answer: Answer) -> None:
    """Its client will be told ``answer``."""
    judged.answer = answer
    judged.given = None if judged.slo_class is None else judged.slo_class.promises[answer.rank]
    judged.ttft_target_s = judged.targets_s[answer.rank] if judged.targets_s else math.inf


def _verdict(rank: int) -> Verdict:
    return Verdict.SECOND_BEST if rank else Verdict.ADMITTED
