"""The mirrors' arrays, and how they move on by themselves.

A mirror is a publication in motion. Since it was made, owed prefill was computed at the planner's own rate, prompts
that ended have become decodes, and whatever the router sent there meanwhile has been entered
(:mod:`slos_serve.routing.mirror_kernel`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.perf.jit import in_place
from slos_serve.planning.state import FloatArray, IntArray
from slos_serve.planning.supply import Supply
from slos_serve.planning.supply import rate_beside as rate_of_supply
from slos_serve.planning.tiers import MAX_TIERS

# Tiers that in-flight requests may add to those a publication has.
TIERS = 2 * MAX_TIERS


class MirrorArrays(NamedTuple):
    """Every mirror of a router: R replicas, N places for owed prompts, L tiers, K memory checkpoints, C classes.

    Attributes:
        clock_s: float64 [R], the time that each mirror shows.
        ready_s: float64 [R], when the step that was running ends; nothing new starts before.
        first, num_owed: int64 [R], owed prompts stand at ``first .. first + num_owed``.
        due_s, cost_tokens, weight, needs_seat: float64 [R, N]; tier, begun: int64 [R, N]; memory: float64 [R, N, K].
        num_tiers: int64 [R].
        pace_s, periods_s, tokens_each, extra_s_each, counts, in_tier: float64 [R, L], see ``Publication``.
        memory_left: float64 [R, K], blocks.
        coefficients: float64 [R, 8].
        draft_s, max_step_tokens, margin, max_implied_ttft_s: float64 [R].
        total_blocks, block_size: int64 [R].
        moments_s, lent_tokens, seats: float64 [R, M], see ``Publication``.
        to_come: float64 [R, 2, SIZES], see ``Publication``.
        forecast_tokens: float64 [R, C, 1]; boost: float64 [R, NUM_SHARES].
        idle_rate: float64 [R], prefill tokens a second of the replica when nothing decodes.
        num_unpromised: int64 [R].
    """

    clock_s: FloatArray
    ready_s: FloatArray
    first: IntArray
    num_owed: IntArray
    due_s: FloatArray
    cost_tokens: FloatArray
    tier: IntArray
    weight: FloatArray
    needs_seat: FloatArray
    begun: IntArray
    memory: FloatArray
    num_tiers: IntArray
    pace_s: FloatArray
    periods_s: FloatArray
    tokens_each: FloatArray
    extra_s_each: FloatArray
    counts: FloatArray
    in_tier: FloatArray
    memory_left: FloatArray
    coefficients: FloatArray
    draft_s: FloatArray
    max_step_tokens: FloatArray
    margin: FloatArray
    max_implied_ttft_s: FloatArray
    total_blocks: IntArray
    block_size: IntArray
    moments_s: FloatArray
    lent_tokens: FloatArray
    seats: FloatArray
    to_come: FloatArray
    forecast_tokens: FloatArray
    boost: FloatArray
    idle_rate: FloatArray
    num_unpromised: IntArray


@njit(cache=True)
def supply_of(m: MirrorArrays, k: int, late_s: float) -> Supply:
    """What replica ``k`` can give to prompts from ``late_s`` after the mirror's time on."""
    return Supply(
        m.coefficients[k],
        m.max_step_tokens[k],
        m.draft_s[k],
        m.clock_s[k] + late_s,
        m.counts[k],
        m.periods_s[k],
        m.tokens_each[k],
        m.extra_s_each[k],
        m.memory_left[k],
        m.moments_s[k],
        m.lent_tokens[k],
        m.seats[k],
    )


@njit(cache=True)
def rate_beside(m: MirrorArrays, k: int, counts: FloatArray) -> float:
    """Prefill tokens a second that replica ``k`` has beside ``counts`` decodes (float64 [L])."""
    return rate_of_supply(counts, supply_of(m, k, 0.0))


@in_place
def _begin_decode(m: MirrorArrays, k: int) -> None:
    """The first owed prompt ends and becomes a decode, in the seat that it took."""
    first = m.first[k]
    m.counts[k, m.tier[k, first]] += 1.0
    for j in range(m.seats.shape[1]):
        m.seats[k, j] -= m.needs_seat[k, first]
    m.first[k] += 1
    m.num_owed[k] -= 1


@njit(cache=True)
def advance(m: MirrorArrays, k: int, to_s: float) -> None:
    """Let replica ``k`` compute what it owes, in order of deadlines, up to ``to_s``.

    A prompt whose deadline has passed has been met or given up; either way it is owed no more.
    """
    while m.clock_s[k] < to_s and m.num_owed[k] > 0:
        rate = rate_beside(m, k, m.counts[k])
        if rate <= 0.0:
            break
        lent = np.interp(np.array([m.clock_s[k], to_s]), m.moments_s[k], m.lent_tokens[k])
        rate += (lent[1] - lent[0]) / (to_s - m.clock_s[k])
        needs_s = m.cost_tokens[k, m.first[k]] / rate
        if m.clock_s[k] + needs_s > to_s:
            m.cost_tokens[k, m.first[k]] -= rate * (to_s - m.clock_s[k])
            break
        m.clock_s[k] += needs_s
        _begin_decode(m, k)
    m.clock_s[k] = max(m.clock_s[k], to_s)
    while m.num_owed[k] > 0 and m.due_s[k, m.first[k]] <= to_s:
        _begin_decode(m, k)


@njit(cache=True)
def load_of(m: MirrorArrays, k: int) -> float:
    """How busy: share of prefill rate or of memory that promises take, plus the seconds of prefill owed."""
    counts = m.counts[k].copy()
    owed = 0.0
    for i in range(m.first[k], m.first[k] + m.num_owed[k]):
        counts[m.tier[k, i]] += 1.0
        owed += m.cost_tokens[k, i]
    used = 1.0 - rate_beside(m, k, counts) / m.idle_rate[k]
    for j in range(m.memory_left.shape[1]):
        used = max(used, 1.0 - m.memory_left[k, j] / max(m.total_blocks[k], 1))
    return float(used + owed / m.idle_rate[k])
