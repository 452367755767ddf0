"""What a replica's mirror expects of a request: its times, and what binds where it does not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from slos_serve.core.verdict import Why
from slos_serve.perf.step_time import roofline_s
from slos_serve.planning.demand import is_lost
from slos_serve.planning.feasible import TOLERANCE
from slos_serve.routing import mirror_kernel as kernel
from slos_serve.routing.mirror_arrays import advance, rate_beside
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.router import RoutingRequest, row_of


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a mirror expects of a request.

    Attributes:
        ttft_s: seconds from its arrival to its first token.
        tpot_s: seconds per output token; ``None`` without such a promise.
        obstacle: what binds, should it not fit.
        ahead_tokens: prompt tokens to compute until its first token, its own counted; attention counted in.
        prefill_rate: prompt tokens a second beside the decodes that are promised and this one; negative where those
            would be too slow.
        kv_blocks, kv_blocks_left: KV blocks it needs at its forecast peak, and those left beside all promises.
    """

    ttft_s: float
    tpot_s: float | None
    obstacle: Why
    ahead_tokens: float
    prefill_rate: float
    kv_blocks: float
    kv_blocks_left: float


def predicted(
    mirrors: Mirrors, name: str, now_s: float, asked: RoutingRequest, *, entered: bool = False
) -> Predicted | None:
    """What a replica's mirror expects of a request if it is taken.

    Args:
        mirrors: of all replicas.
        name: of one of them.
        now_s: present time on the router's clock.
        asked: the request.
        entered: the mirror counts it among what it has promised already, so that nothing is known of what would bind.

    Returns:
        ``None`` where the replica has not published, or the first token is lost already.
    """
    k, m = mirrors.position(name), mirrors.arrays
    if not mirrors.has_published(name):
        return None
    advance(m, k, max(now_s, float(m.ready_s[k])))
    state = kernel.state_of_one(m, k, row_of(asked), min(asked.cached.get(name, 0), asked.prompt_tokens - 1))
    if is_lost(state, 0):
        return None
    due_s, cost, tier, _, memory = kernel.demand(m, k, state, kernel.NOTHING)
    counts = m.counts[k].copy()
    rate = rate_beside(m, k, counts)
    counts[tier] += 1.0
    obstacle = Why.TTFT_TOO_LATE
    if np.any(memory > m.memory_left[k, : len(memory)] + TOLERANCE):
        obstacle = Why.KV_FULL
    elif not kernel.has_seat(m, k, due_s, cost):
        obstacle = Why.SEQS_FULL
    first, count = int(m.first[k]), int(m.num_owed[k])
    before = int(np.searchsorted(m.due_s[k, first : first + count], due_s, side="right"))
    owed = float(m.cost_tokens[k, first : first + before].sum()) + (0.0 if entered else cost)
    ready_s = max(float(m.ready_s[k]), now_s)
    beside = rate_beside(m, k, counts)
    left_s = due_s - ready_s
    # Its tokens take most of what prompts have, and without them its own would be in time.
    if obstacle is Why.TTFT_TOO_LATE and beside < 0.5 * rate and (beside < 0.0 or owed <= rate * left_s):
        obstacle = Why.DECODE_RATE
    # Even a short prompt takes a whole step beside the decodes that run.
    step_s = float(roofline_s(m.coefficients[k], m.counts[k].sum() + min(owed, m.max_step_tokens[k])))
    step_s += float((m.counts[k] * m.extra_s_each[k]).sum())
    ttft_s = ready_s - asked.arrival_s + max(owed / max(rate, 1e-9), step_s)
    # While prompts are owed, steps are as long as the tightest pace allows; else as long as the decodes take.
    busy_share = min(owed / max(rate, 1e-9) / max(asked.max_tokens * asked.tpot_s, 1e-9), 1.0)
    alone_s = float(roofline_s(m.coefficients[k], counts.sum()) + (counts * m.extra_s_each[k]).sum())
    tpot_s = min(busy_share * asked.tpot_s + (1.0 - busy_share) * alone_s, asked.tpot_s)
    return Predicted(
        ttft_s=ttft_s,
        tpot_s=tpot_s if math.isfinite(tpot_s) else None,
        obstacle=obstacle,
        ahead_tokens=owed,
        prefill_rate=float(beside),
        kv_blocks=float(memory.max()),
        kv_blocks_left=float(m.memory_left[k, : len(memory)].min()),
    )
