"""Which replica a request goes to: the first whose mirror can attain it, in an order of asking that is a policy.

``PACK`` asks the busiest first and leaves others empty for what is hard to place; ``SPREAD`` asks the least busy first;
``PREFIX`` asks the replica that has the request's prefix cached before the others, and then those as ``SPREAD`` does.
Where nobody attains, the request goes unpromised to the replica with the fewest of its kind, which may still promise it
later, or is refused when its class says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from slos_serve.core.request import REQUEST_DTYPE, RequestArray, Status, share_of
from slos_serve.core.slo import check_number
from slos_serve.core.verdict import Verdict, Why
from slos_serve.routing import mirror_kernel as kernel
from slos_serve.routing.mirror_arrays import advance
from slos_serve.routing.mirrors import Mirrors, Sent
from slos_serve.routing.settings import STALE_AFTER_S, Order


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What routing needs to know of a request. Times are on the router's clock.

    Attributes:
        arrival_s: when the client sent it.
        prompt_tokens, max_tokens: length, and the cap on the answer's.
        ttft_due_s: when the first token is due; ``inf`` without such a promise.
        tpot_s: promised time per output token; ``inf`` without such a promise.
        answer_due_s: when the last token is due; ``inf`` without such a promise.
        class_index, weight: its class.
        share: see :func:`slos_serve.core.request.share_of`; ``None`` for its class's.
        hint_tokens: the client's forecast of the answer's length, 0 without one.
        cached: replica -> prompt tokens that its prefix cache would supply.
        missed: a promise to an earlier call of its session is broken for good, so that nothing is to be kept.
        reject_when_full: refuse it where nobody attains, instead of serving it without a promise.
        avoid: replicas that were lost under it; they get it only where there is no other.
        ticket: number that its replica's publications name once its engine has the request; 0 without one.
        binding: a promise to it binds its engine from the moment it is told, so that no later request takes its place.
    """

    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    ttft_due_s: float = np.inf
    tpot_s: float = np.inf
    answer_due_s: float = np.inf
    class_index: int = 0
    share: int | None = None
    weight: float = 1.0
    hint_tokens: int = 0
    cached: Mapping[str, int] = field(default_factory=dict)
    missed: bool = False
    reject_when_full: bool = False
    avoid: Collection[str] = ()
    ticket: int = 0
    binding: bool = False

    @property
    def own_share(self) -> int:
        """``share``, or its class's."""
        return share_of(self.class_index) if self.share is None else self.share

    @property
    def has_slo(self) -> bool:
        """Whether there is a promise to be kept."""
        return not self.missed and bool(np.isfinite(min(self.ttft_due_s, self.tpot_s, self.answer_due_s)))


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Where a request goes and why.

    Attributes:
        replica: its name; ``None`` when the request is rejected.
        verdict, reason: see :mod:`slos_serve.core.verdict`.
    """

    replica: str | None
    verdict: Verdict
    reason: Why


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """How a router decides.

    Attributes:
        order: whom to ask first.
        stale_after_s: a replica that has not published for this long counts as full.
    """

    order: Order = Order.PREFIX
    stale_after_s: float = STALE_AFTER_S

    def __post_init__(self) -> None:
        check_number("stale_after_s", self.stale_after_s, low=0.0, high=3600.0)


DEFAULT = RouterSettings()


def route(
    now_s: float, request: RoutingRequest, mirrors: Mirrors, settings: RouterSettings = DEFAULT
) -> RoutingDecision:
    """Decide, and reserve at once: the chosen mirror counts the request from here on.

    Args:
        now_s: present time on the router's clock; never decreases from call to call.
        request: what asks.
        mirrors: the replicas; changed by the call.
        settings: order and bound.
    """
    if not len(mirrors):
        return RoutingDecision(None, Verdict.REJECTED, Why.NO_REPLICA)
    row = row_of(request)
    usable, present = mirrors.usable(now_s, settings.stale_after_s), mirrors.present
    away = [mirrors.position(name) for name in request.avoid if name in mirrors]
    if 0 < len(away) < len(mirrors):
        usable[away], present = False, present.copy()
        present[away] = False
    cached = np.zeros(len(usable), dtype=np.int64)
    for name, tokens in request.cached.items():
        if name in mirrors:
            cached[mirrors.position(name)] = min(tokens, request.prompt_tokens - 1)
    k, why = kernel.NOBODY, Why.SESSION_MISSED if request.missed else Why.NO_SLO
    if request.has_slo:
        home = int(cached.argmax()) if settings.order is Order.PREFIX and cached.any() else kernel.NOBODY
        asking = kernel.PACK if settings.order is Order.PACK else kernel.SPREAD
        k, answer = kernel.choose(mirrors.arrays, asking, now_s, row, cached, usable, home)
        why = Why.FITS_INSTEAD if answer == kernel.INSTEAD else Why.FITS_AT_PREFIX if k == home else Why.FITS
    if k != kernel.NOBODY:
        mirrors.send(k, Sent(now_s, row, int(cached[k]), promised=True, ticket=request.ticket))
        return RoutingDecision(mirrors.name_of(k), Verdict.ADMITTED, why)
    if request.has_slo:
        why = Why.ALL_FULL if usable.any() else Why.NO_STATE
        if request.reject_when_full:
            return RoutingDecision(None, Verdict.REJECTED, why)
    k = kernel.least_loaded(mirrors.arrays, now_s, present, usable)
    mirrors.send(k, Sent(now_s, row, int(cached[k]), promised=False, ticket=request.ticket))
    verdict = Verdict.NO_SLO if why is Why.NO_SLO else Verdict.BEST_EFFORT
    return RoutingDecision(mirrors.name_of(k), verdict, why)


def verdicts(
    now_s: float, request: RoutingRequest, mirrors: Mirrors, settings: RouterSettings = DEFAULT
) -> dict[str, bool]:
    """Whether each replica with a fresh publication would attain the request; nothing is reserved."""
    row = row_of(request)
    usable = mirrors.usable(now_s, settings.stale_after_s)
    found = {}
    for name in mirrors:
        k = mirrors.position(name)
        if usable[k]:
            m = mirrors.arrays
            advance(m, k, max(now_s, float(m.ready_s[k])))
            tokens = min(request.cached.get(name, 0), request.prompt_tokens - 1)
            found[name] = request.has_slo and kernel.ask(m, k, row, tokens)[0] != kernel.NO
    return found


def unpromised(now_s: float, request: RoutingRequest) -> Sent:
    """The request as one that goes to a replica without a promise."""
    return Sent(now_s, row_of(request), 0, promised=False, ticket=request.ticket)


def row_of(request: RoutingRequest) -> RequestArray:
    """:data:`slos_serve.core.request.REQUEST_DTYPE` [1]: the request as a replica's own table would hold it."""
    row = np.zeros(1, dtype=REQUEST_DTYPE)
    for name in ("arrival_s", "prompt_tokens", "max_tokens", "answer_due_s", "class_index", "weight", "hint_tokens"):
        row[name] = getattr(request, name)
    row["last_token_s"], row["share"], row["expected_tokens"] = request.arrival_s, request.own_share, request.max_tokens
    row["ttft_due_s"] = row["promised_ttft_due_s"] = request.ttft_due_s
    row["tpot_s"] = row["promised_tpot_s"] = request.tpot_s
    row["stage_start_s"], row["max_stall_s"], row["has_slo"] = np.nan, np.inf, 1
    row["status"] = Status.ADMITTED if request.binding else Status.UNDECIDED
    return row
