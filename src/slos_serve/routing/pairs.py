"""Which two replicas a request goes to where prefill and decode are apart, and which replica does which.

Both are asked by their mirrors, as one replica is. The decode replica is asked for the pace and for the KV of the whole
answer; the prompt counts as computed but for its last token, which vLLM computes anew. The prefill replica is asked for
the rest of the prompt, due earlier by what the hand-over takes: the transfer and the first steps of the decode replica.
A server that schedules ahead sees a prompt one step late, and steps of prompts are long: the mirror is asked for that.

Roles may move. A request that no replica of a role can take makes one of the other role change, if that one could take
it and another one of its role remains. A replica that changes keeps what it serves: it computes the prompts it has and
generates the answers it has, beside its new work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from slos_serve.core.verdict import Verdict, Why
from slos_serve.perf.step_time import roofline_s
from slos_serve.planning.state import IntArray
from slos_serve.routing import mirror_kernel as kernel
from slos_serve.routing.mirror_kernel import BoolArray
from slos_serve.routing.mirrors import Mirrors, Sent
from slos_serve.routing.router import DEFAULT, RouterSettings, RoutingRequest, row_of
from slos_serve.routing.settings import Order

# Steps of the decode replica from the arrival of the KV to the first token: the one that is scheduled behind the one
# that runs, and its own. With a half or all of that one too, fewer requests attain (benchmarks/LOG.md).
STEPS_TO_FIRST_TOKEN = 2
# A replica keeps a role for at least this long, so that two requests do not move it to and fro (benchmarks/LOG.md).
SETTLED_S = 5.0


class Role(StrEnum):
    """What a replica is sent."""

    PREFILL = "prefill"
    DECODE = "decode"


class Roles:
    """Who has which role.

    Args:
        names: of the replicas.
        prefill: how many of them, from the first on, begin as prefill replicas.
        moving: roles may move.

    Attributes:
        moves: how often a replica changed its role.
    """

    def __init__(self, names: Iterable[str], prefill: int, *, moving: bool = False) -> None:
        self._roles = {name: Role.PREFILL if k < prefill else Role.DECODE for k, name in enumerate(names)}
        self._moved_s = dict.fromkeys(self._roles, -np.inf)
        self._moving = moving
        self.moves = 0

    def of(self, role: Role) -> list[str]:
        """Names of the replicas that have a role."""
        return [name for name, own in self._roles.items() if own is role]

    def remove(self, name: str) -> None:
        """A replica is gone. Where it was the last of its role, one of the others takes it."""
        role = self._roles.pop(name, None)
        if role is not None and self._roles and not self.of(role):
            self._roles[next(iter(self._roles))] = role

    def may_move_to(self, role: Role, now_s: float) -> list[str]:
        """Replicas of the other role that could take this one now; none where they would be the last of theirs."""
        others = [name for name, own in self._roles.items() if own is not role]
        if not self._moving or len(others) < 2:
            return []
        return [name for name in others if self._moved_s[name] + SETTLED_S <= now_s]

    def move(self, name: str, role: Role, now_s: float) -> None:
        """Give a replica another role."""
        self._roles[name], self._moved_s[name] = role, now_s
        self.moves += 1


@dataclass(frozen=True, slots=True)
class PairDecision:
    """Where a request's prompt and its answer go, and why.

    Attributes:
        prefill: replica that computes the prompt; ``None`` when the request is rejected.
        decode: replica that generates the answer; ``None`` while nobody has promised to.
        prompt_due_s: when the prompt must be computed for the promise to be kept.
        verdict, reason: see :mod:`slos_serve.core.verdict`.
    """

    prefill: str | None
    decode: str | None
    prompt_due_s: float
    verdict: Verdict
    reason: Why


@dataclass(frozen=True, slots=True)
class _Fleet:
    """Who is asked: mirrors, whose publications are fresh (``usable``), roles and the order of asking."""

    now_s: float
    mirrors: Mirrors
    roles: Roles
    usable: BoolArray
    order: Order


def route_pair(
    now_s: float,
    request: RoutingRequest,
    mirrors: Mirrors,
    roles: Roles,
    transfer_s: float,
    settings: RouterSettings = DEFAULT,
) -> PairDecision:
    """Decide, and reserve at once in both mirrors.

    Args:
        now_s: present time on the router's clock; never decreases from call to call.
        request: what asks; ``ticket`` names it to the decode replica, which gets it later.
        mirrors: of all replicas; changed by the call.
        roles: of them; changed by the call where they may move.
        transfer_s: seconds that the prompt's KV takes from one replica to another.
        settings: order and bound.
    """
    fleet = _Fleet(now_s, mirrors, roles, mirrors.usable(now_s, settings.stale_after_s), settings.order)
    if not request.has_slo:
        prompt = _prompt_of(request, np.inf)
        return _unpromised(fleet, prompt, Why.SESSION_MISSED if request.missed else Why.NO_SLO)
    k, moved_decode = _fitting(fleet, request, Role.DECODE)
    due_s = _first_token_due_s(request, mirrors, k) - hand_over_s(mirrors, k, roles, transfer_s)
    prompt = _prompt_of(request, due_s - _scheduled_s(mirrors, roles))
    if k != kernel.NOBODY:
        avoid = mirrors.name_of(k)
        at, moved_prefill = _fitting(fleet, prompt, Role.PREFILL, avoid)
        if at != kernel.NOBODY:
            for name, role in ((moved_decode, Role.DECODE), (moved_prefill, Role.PREFILL)):
                if name is not None:
                    roles.move(name, role, now_s)
            cached = _cached(prompt, mirrors)[at]
            mirrors.send(at, Sent(now_s, row_of(prompt), int(cached), promised=True))
            _reserve(now_s, request, mirrors, k, promised=True)
            return PairDecision(mirrors.name_of(at), mirrors.name_of(k), due_s, Verdict.ADMITTED, Why.FITS)
    why = Why.ALL_FULL if fleet.usable.any() else Why.NO_STATE
    if request.reject_when_full:
        return PairDecision(None, None, due_s, Verdict.REJECTED, why)
    return _unpromised(fleet, prompt, why)


def route_answer(
    now_s: float, request: RoutingRequest, mirrors: Mirrors, roles: Roles, settings: RouterSettings = DEFAULT
) -> str | None:
    """The decode replica of a request that was sent to its prefill replica without a promise; reserved at once."""
    fleet = _Fleet(now_s, mirrors, roles, mirrors.usable(now_s, settings.stale_after_s), settings.order)
    k = kernel.NOBODY
    if request.has_slo:
        k, _ = _fitting(fleet, request, Role.DECODE, may_move=False)
    promised = k != kernel.NOBODY
    if not promised:
        present = _among(mirrors, roles.of(Role.DECODE))
        k = kernel.least_loaded(mirrors.arrays, now_s, present, fleet.usable & present)
    if k == kernel.NOBODY:
        return None
    _reserve(now_s, request, mirrors, k, promised=promised)
    return mirrors.name_of(k)


def hand_over_s(mirrors: Mirrors, k: int, roles: Roles, transfer_s: float) -> float:
    """Seconds from the end of a prompt to the first token, when the replica at position ``k`` generates the answer.

    Without one (``NOBODY``) of the fastest of those that generate answers.
    """
    m = mirrors.arrays
    places = [k] if k != kernel.NOBODY else [mirrors.position(name) for name in roles.of(Role.DECODE)]
    steps_s = []
    for place in places:
        counts, tiers = m.counts[place], m.num_tiers[place]
        decodes_s = roofline_s(m.coefficients[place], float(counts.sum()) + 1.0)
        decodes_s += float((counts[:tiers] * m.extra_s_each[place, :tiers]).sum())
        steps_s.append(max(decodes_s, mirrors.planned_step_s(place)))
    return transfer_s + STEPS_TO_FIRST_TOKEN * min(steps_s, default=0.0)


def _scheduled_s(mirrors: Mirrors, roles: Roles) -> float:
    """Seconds of the shortest step that a prefill replica has scheduled: a prompt that comes now starts behind it."""
    steps_s = [mirrors.planned_step_s(mirrors.position(name)) for name in roles.of(Role.PREFILL) if name in mirrors]
    return min(steps_s, default=0.0)


def _fitting(
    fleet: _Fleet, request: RoutingRequest, role: Role, avoid: str | None = None, *, may_move: bool = True
) -> tuple[int, str | None]:
    """Position of a replica that attains a part, ``NOBODY`` without one; and its name if it had to take the role."""
    mirrors, row = fleet.mirrors, row_of(request)
    if role is Role.DECODE:
        cached = np.full(len(fleet.usable), request.prompt_tokens - 1)
        home = kernel.NOBODY
    else:
        cached = _cached(request, mirrors)
        home = int(cached.argmax()) if fleet.order is Order.PREFIX and cached.any() else kernel.NOBODY
    order = kernel.PACK if fleet.order is Order.PACK else kernel.SPREAD
    movable = fleet.roles.may_move_to(role, fleet.now_s) if may_move else []
    for names, moves in ((fleet.roles.of(role), False), (movable, True)):
        among = _among(mirrors, [name for name in names if name != avoid]) & fleet.usable
        if not among.any():
            continue
        first = home if home >= 0 and among[home] else kernel.NOBODY
        k, _ = kernel.choose(mirrors.arrays, order, fleet.now_s, row, cached, among, first)
        if k != kernel.NOBODY:
            return int(k), mirrors.name_of(k) if moves else None
    return kernel.NOBODY, None


def _unpromised(fleet: _Fleet, prompt: RoutingRequest, why: Why) -> PairDecision:
    """The prefill replica with the fewest requests without a promise; no decode replica yet."""
    mirrors, present = fleet.mirrors, _among(fleet.mirrors, fleet.roles.of(Role.PREFILL))
    k = kernel.least_loaded(mirrors.arrays, fleet.now_s, present, fleet.usable & present)
    verdict = Verdict.NO_SLO if why is Why.NO_SLO else Verdict.BEST_EFFORT
    if k == kernel.NOBODY:
        return PairDecision(None, None, prompt.ttft_due_s, Verdict.REJECTED, Why.NO_REPLICA)
    cached = int(_cached(prompt, mirrors)[k])
    mirrors.send(k, Sent(fleet.now_s, row_of(prompt), cached, promised=False))
    return PairDecision(mirrors.name_of(k), None, prompt.ttft_due_s, verdict, why)


def _reserve(now_s: float, request: RoutingRequest, mirrors: Mirrors, k: int, *, promised: bool) -> None:
    """Count an answer at the replica at position ``k``, until a publication shows it."""
    sent = Sent(now_s, row_of(request), request.prompt_tokens - 1, promised=promised, ticket=request.ticket)
    mirrors.send(k, sent)


def _first_token_due_s(request: RoutingRequest, mirrors: Mirrors, k: int) -> float:
    """When the first token is due, by the deadline of the whole answer too; with a pace alone, as planners imply it."""
    if k == kernel.NOBODY:
        return request.ttft_due_s
    due_s = request.ttft_due_s
    if np.isfinite(request.answer_due_s):
        state = kernel.state_of_one(mirrors.arrays, k, row_of(request), request.prompt_tokens - 1)
        due_s = float(state.rows["ttft_due_s"][0])
    return due_s if due_s < np.inf else request.arrival_s + float(mirrors.arrays.max_implied_ttft_s[k])


def _prompt_of(request: RoutingRequest, due_s: float) -> RoutingRequest:
    """The part of a request that its prefill replica serves."""
    return replace(request, ttft_due_s=due_s, tpot_s=np.inf, answer_due_s=np.inf, max_tokens=1, ticket=0)


def _cached(request: RoutingRequest, mirrors: Mirrors) -> IntArray:
    """int64 [R], prompt tokens that each replica has cached."""
    cached = np.zeros(len(mirrors.present), dtype=np.int64)
    for name, tokens in request.cached.items():
        if name in mirrors:
            cached[mirrors.position(name)] = min(tokens, request.prompt_tokens - 1)
    return cached


def _among(mirrors: Mirrors, names: Iterable[str]) -> BoolArray:
    chosen = np.zeros(len(mirrors.present), dtype=np.bool_)
    chosen[[mirrors.position(name) for name in names if name in mirrors]] = True
    return chosen
