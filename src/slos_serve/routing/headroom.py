"""What a replica could promise right now: requests of a class, prompt tokens, a pace; and how full it is.

The room is asked of a mirror, as routing does, until it says no: it counts what comes all at once. Nothing of it is
sent: the mirror is one of this module's own. Fullness is about requests that keep coming: prompt tokens a second over
what the replica computes beside its decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slos_serve.core.verdict import Verdict, Why
from slos_serve.perf.step_time import per_token_s, request_s, roofline_s
from slos_serve.routing import mirror_kernel as kernel
from slos_serve.routing.mirror_arrays import advance, rate_beside
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.publication import Publication
from slos_serve.routing.router import RouterSettings, RoutingRequest, route, row_of
from slos_serve.routing.settings import Order

MOST = 32
STANDARD_PROMPT_TOKENS = 512
LONGEST_TTFT_S = 600.0
MOST_BUSY = 2.0
# Prompt tokens are searched to this share of what is found.
_NEAR = 1.02
_ONLY_BESIDE = frozenset({Why.FITS, Why.FITS_AT_PREFIX})


@dataclass(frozen=True, slots=True)
class Room:
    """What a replica tells the routers of others: one number of each kind, whatever its classes.

    Attributes:
        least_headroom: requests of the class with least :func:`headroom`.
        standard_ttft_s: see :func:`standard_ttft_s`.
        next_tpot_s: see :func:`next_tpot_s`.
    """

    least_headroom: float
    standard_ttft_s: float
    next_tpot_s: float


def together(rooms: Sequence[Room]) -> Room:
    """The room of several replicas, one at least: all headroom, and the best times that one of them has."""
    return Room(
        sum(room.least_headroom for room in rooms),
        min(room.standard_ttft_s for room in rooms),
        min(room.next_tpot_s for room in rooms),
    )


def room_of(publication: Publication, least_headroom: float, now_s: float) -> Room:
    """What a replica tells; arguments as of :func:`standard_ttft_s`."""
    return Room(float(least_headroom), standard_ttft_s(publication, now_s), next_tpot_s(publication))


def _mirror_of(publication: Publication) -> Mirrors:
    """The replica alone."""
    mirrors = Mirrors([publication.replica], num_classes=len(publication.forecast_tokens))
    mirrors.update(publication)
    return mirrors


def headroom(publication: Publication, typical: RoutingRequest, now_s: float, most: int = MOST) -> int:
    """Requests like ``typical`` that the replica could promise beside what it has promised, ``most`` at most.

    Args:
        publication: the replica's latest.
        typical: a request of the class; its times are relative to its arrival, which is taken to be now.
        now_s: present time on the replica's clock.
    """
    mirrors = _mirror_of(publication)
    settings = RouterSettings(Order.SPREAD, stale_after_s=3600.0)
    asked = replace(_coming(typical, now_s), reject_when_full=True)
    for count in range(most):
        decision = route(now_s, asked, mirrors, settings)
        if decision.verdict is not Verdict.ADMITTED or decision.reason not in _ONLY_BESIDE:
            return count
    return most


def _coming(typical: RoutingRequest, now_s: float) -> RoutingRequest:
    """The same request, arriving now."""
    later_s = now_s - typical.arrival_s
    return replace(
        typical,
        arrival_s=now_s,
        ttft_due_s=typical.ttft_due_s + later_s,
        answer_due_s=typical.answer_due_s + later_s,
    )


def headroom_prefill_tokens(publication: Publication, typical: RoutingRequest, now_s: float) -> int:
    """Tokens of the longest prompt that the replica could promise now, to a request that is else like ``typical``.

    Its deadlines are those of ``typical``, also where a class allows longer prompts more time. Arguments as of
    :func:`headroom`.
    """
    mirrors = _mirror_of(publication)
    k, m = mirrors.position(publication.replica), mirrors.arrays
    advance(m, k, max(now_s, float(m.ready_s[k])))
    row = row_of(_coming(typical, now_s))

    def fits(tokens: int) -> bool:
        row["prompt_tokens"] = tokens
        return bool(kernel.ask(m, k, row, 0)[0] == kernel.BESIDE)

    if not typical.has_slo or not fits(1):
        return 0
    fitting, too_many = 1, publication.total_blocks * publication.block_size + 1
    while too_many - fitting > 1 and too_many > _NEAR * fitting:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def next_tpot_s(publication: Publication) -> float:
    """Seconds per output token of one more stream: of a batch of the promised decodes and it."""
    mirrors = _mirror_of(publication)
    k, m = mirrors.position(publication.replica), mirrors.arrays
    own_s = float((m.counts[k] * m.extra_s_each[k]).sum() + m.extra_s_each[k].max())
    return float(roofline_s(m.coefficients[k], m.counts[k].sum() + 1.0)) + own_s


def standard_ttft_s(publication: Publication, now_s: float, prompt_tokens: int = STANDARD_PROMPT_TOKENS) -> float:
    """Seconds to the first token of a prompt that came now and waited its turn behind all that is owed.

    Args:
        publication: the replica's latest.
        now_s: present time on the replica's clock.
        prompt_tokens: its length.

    Returns:
        At most :data:`LONGEST_TTFT_S`: decodes may leave no room for prompts at all.
    """
    mirrors = _mirror_of(publication)
    k, m = mirrors.position(publication.replica), mirrors.arrays
    ready_s = max(now_s, float(m.ready_s[k]))
    advance(m, k, ready_s)
    first, count = int(m.first[k]), int(m.num_owed[k])
    tokens = float(m.cost_tokens[k, first : first + count].sum()) + prompt_tokens
    rate = max(rate_beside(m, k, m.counts[k]), 1e-9)
    return min(ready_s - now_s + tokens / rate, LONGEST_TTFT_S)


def promises(publication: Publication) -> int:
    """Requests that the replica has promised or means to."""
    return round(float(np.sum(publication.counts))) + len(publication.due_s)


def with_attention(publication: Publication, prompt_tokens: int) -> float:
    """What a token of such a prompt costs in tokens, its attention and the fixed time of its request counted in."""
    coefficients, tokens = publication.coefficients, float(prompt_tokens)
    return 1.0 + float(request_s(coefficients, tokens, 0.0) / (tokens * per_token_s(coefficients)))


def busy(publication: Publication, asked_tokens_per_s: float) -> float:
    """Share of the replica's time, or of its KV where that is more, that promises take; ``MOST_BUSY`` at most.

    Args:
        publication: the replica's latest.
        asked_tokens_per_s: prompt tokens that come with requests for a promise, :func:`with_attention`.
    """
    mirrors = _mirror_of(publication)
    k, m = mirrors.position(publication.replica), mirrors.arrays
    beside_decodes = max(rate_beside(m, k, m.counts[k]), 1e-9)
    of_kv = 1.0 - float(publication.memory_left.min()) / max(publication.total_blocks, 1)
    return min(max(asked_tokens_per_s / beside_decodes, of_kv), MOST_BUSY)


def fullness(publication: Publication, asked_tokens_per_s: float, unpromised: int) -> float:
    """How full a replica is, 1 being just full: how busy promises keep it, times what was asked for over what was
    promised.

    Args:
        publication: the replica's latest.
        asked_tokens_per_s: see :func:`busy`.
        unpromised: requests there that asked for a promise and got none.
    """
    promised = promises(publication)
    used = busy(publication, asked_tokens_per_s)
    return used if unpromised == 0 else max(used, 1.0) * (promised + unpromised) / max(promised, 1)
