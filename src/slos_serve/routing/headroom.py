"""How many more typical requests of a class a replica could promise right now, and how full it is.

The first is asked of a mirror, as routing does, again and again until it says no: it counts requests that come all at
once. Nothing of it is sent: the mirror is one of this module's own. The second is about requests that keep coming:
prompt tokens a second over what the replica computes beside its decodes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slos_serve.core.verdict import Verdict, Why
from slos_serve.perf.step_time import per_token_s, request_s
from slos_serve.routing.mirror_arrays import advance, rate_beside
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.publication import Publication
from slos_serve.routing.router import RouterSettings, RoutingRequest, route
from slos_serve.routing.settings import Order

MOST = 32
STANDARD_PROMPT_TOKENS = 512
LONGEST_TTFT_S = 600.0
MOST_BUSY = 2.0
_ONLY_BESIDE = frozenset({Why.FITS, Why.FITS_AT_PREFIX})


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
    asked = replace(
        typical, arrival_s=now_s, ttft_due_s=now_s + (typical.ttft_due_s - typical.arrival_s), reject_when_full=True
    )
    for count in range(most):
        decision = route(now_s, asked, mirrors, settings)
        if decision.verdict is not Verdict.ADMITTED or decision.reason not in _ONLY_BESIDE:
            return count
    return most


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
