"""Answers whose heads wait until the engine has made their promises, or can make none.

The engine asks anew with each plan: what ends early leaves room, and until a prompt begins a cheaper one may take its
place. Until a first token would be late, or the answer begins, nothing is lost by a head that says how that went. The
engine tells of a promise when it makes it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from slos_serve.core.verdict import Verdict, Why
from slos_serve.routing.router import RoutingRequest
from slos_serve.vllm_plugin.front.judged import Judged
from slos_serve.vllm_plugin.front.mirror import Answer

# No head waits longer, whatever is promised: clients and proxies may not be patient.
MOST_HELD_S = 5.0
# A promise leaves the engine a step before the first token, and another thread of this process takes it in.
LAST_WORD_S = 0.01
# Of a request that fitted as it came, while the engine has not promised it anything.
PASSED_OVER = Answer(Verdict.BEST_EFFORT, Why.PASSED_OVER)


def may_wait(params: Any, target_s: float) -> bool:
    """Whether the engine decides before the head of an answer goes out.

    Args:
        params: vLLM's sampling parameters; they say whether the answer is sent in one piece at its end.
        target_s: seconds that the first token has.
    """
    kind = getattr(params, "output_kind", None)
    return getattr(kind, "name", None) == "FINAL_ONLY" or target_s <= MOST_HELD_S


def with_binding(several: Sequence[RoutingRequest], told_at_once: bool) -> list[RoutingRequest]:
    """A request's promises, in order; those are binding that are told before the engine has made them.

    A refusable request that is let in has its room. A weaker promise is told as soon as it is found: the engine would
    ask for it only once the first one is lost.
    """
    at_once = told_at_once or several[0].reject_when_full
    return [replace(one, binding=at_once or rank > 0) for rank, one in enumerate(several)]


class OpenPromises:
    """Requests that may still be promised something before their clients are told. Used from one event loop, if any."""

    def __init__(self) -> None:
        self._by_ticket: dict[int, Judged] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, judged: Judged, ticket: int, request_id: str) -> None:
        """A request that the engine decides on."""
        judged.open[ticket] = request_id
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
            await _decided(judged, left_s)

    async def last_word(self, judged: Judged) -> None:
        """The answer begins: a promise that the mirror hoped for is in this process by now, or was not made."""
        hoped = judged.hoped
        if judged.open and hoped is not None and hoped.verdict in (Verdict.ADMITTED, Verdict.SECOND_BEST):
            await _decided(judged, LAST_WORD_S)

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
                give(judged, _promised(judged))
                judged.decided.set()


async def _decided(judged: Judged, most_s: float) -> None:
    with_timeout = asyncio.wait_for(judged.decided.wait(), most_s)
    await asyncio.gather(with_timeout, return_exceptions=True)


def give(judged: Judged, answer: Answer) -> None:
    """Its client will be told ``answer``."""
    judged.answer = answer
    judged.given = None if judged.slo_class is None else judged.slo_class.promises[answer.rank]
    judged.ttft_target_s = judged.targets_s[answer.rank] if judged.targets_s else math.inf


def _promised(judged: Judged) -> Answer:
    """What the engine promised; with the mirror's reason and predictions, where it hoped for the same."""
    rank, hoped = judged.late_rank, judged.hoped
    if hoped is not None and (hoped.verdict, hoped.rank) == (_verdict(rank), rank):
        return hoped
    return Answer(_verdict(rank), Why.FITS, rank=rank)


def _verdict(rank: int) -> Verdict:
    return Verdict.SECOND_BEST if rank else Verdict.ADMITTED
