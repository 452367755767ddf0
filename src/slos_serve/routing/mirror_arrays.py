"""The mirrors' arrays, and how they move on by themselves.

A mirror is a publication in motion. Since it was made, owed prefill was computed at the planner's own rate, prompts
that ended have become decodes, and whatever the router sent there meanwhile has been entered
(:mod:`slos_serve.routing.mirror_kernel`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.planning.candidates import MAX_TIERS
from slos_serve.planning.prefill_rate import FloatArray, IntArray, prefill_rate

# Tiers that in-flight requests may add to those a publication has.
TIERS = 2 * MAX_TIERS


class MirrorArrays(NamedTuple):
    """Every mirror of a router: R replicas, N places for owed prompts, L tiers, K memory checkpoints, C classes.

    Attributes:
        clock_s: float64 [R], the time that each mirror shows.
        ready_s: float64 [R], when the step that was running ends; nothing new starts before.
        first, num_owed: int64 [R], owed prompts stand at ``first .. first + num_owed``.
        due_s, cost_tokens, weight: float64 [R, N]; tier, begun: int64 [R, N]; memory: float64 [R, N, K].
        num_tiers: int64 [R].
        pace_s, periods_s, tokens_each, extra_s_each, counts, in_tier: float64 [R, L], see ``Publication``.
        memory_left: float64 [R, K], blocks.
        coefficients: float64 [R, 8].
        draft_s, max_step_tokens, most_open_tokens, tpot_margin, max_implied_ttft_s: float64 [R].
        total_blocks, block_size: int64 [R].
        freed_at_s, freed_tokens, longer_tokens: float64 [R, F], see ``Publication``.
        forecast_tokens: float64 [R, C, 1].
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
    most_open_tokens: FloatArray
    tpot_margin: FloatArray
    max_implied_ttft_s: FloatArray
    total_blocks: IntArray
    block_size: IntArray
    freed_at_s: FloatArray
    freed_tokens: FloatArray
    longer_tokens: FloatArray
    forecast_tokens: FloatArray
    idle_rate: FloatArray
    num_unpromised: IntArray


@njit(cache=True)
def rate_beside(m: MirrorArrays, k: int, counts: FloatArray) -> float:
    """Prefill tokens a second that replica ``k`` has beside ``counts`` decodes (float64 [L])."""
    return prefill_rate(
        counts,
        m.periods_s[k],
        m.tokens_each[k],
        m.extra_s_each[k],
        m.draft_s[k],
        m.coefficients[k],
        m.max_step_tokens[k],
    )


@njit(cache=True)
def _begin_decode(m: MirrorArrays, k: int) -> None:
    """The first owed prompt ends and becomes a decode."""
    m.counts[k, m.tier[k, m.first[k]]] += 1.0
    # It has no lead yet: no step is longer than its pace from now on.
    m.longer_tokens[k] = 0.0
    m.first[k] += 1
    m.num_owed[k] -= 1


@njit(cache=True)
def _at(times_s: FloatArray, values: FloatArray, time_s: float) -> float:
    """Linear between the times given, constant beyond; for a few of them and without an array made."""
    if time_s <= times_s[0]:
        return float(values[0])
    for i in range(1, len(times_s)):
        if time_s <= times_s[i]:
            part = (time_s - times_s[i - 1]) / (times_s[i] - times_s[i - 1])
            return float(values[i - 1] + part * (values[i] - values[i - 1]))
    return float(values[-1])


@njit(cache=True)
def _left_by_decodes(m: MirrorArrays, k: int, until_s: float, longer_until_s: float) -> float:
    """Prefill tokens that held or ended decodes leave from the mirror's time on, and those gained by longer steps."""
    at_s, freed, longer = m.freed_at_s[k], m.freed_tokens[k], m.longer_tokens[k]
    gained = _at(at_s, longer, max(longer_until_s, m.clock_s[k])) - _at(at_s, longer, m.clock_s[k])
    return _at(at_s, freed, until_s) - _at(at_s, freed, m.clock_s[k]) + gained


@njit(cache=True)
def advance(m: MirrorArrays, k: int, to_s: float) -> None:
    """Let replica ``k`` compute what it owes, in order of deadlines, up to ``to_s``.

    A prompt whose deadline has passed has been met or given up; either way it is owed no more.
    """
    while m.clock_s[k] < to_s and m.num_owed[k] > 0:
        rate = rate_beside(m, k, m.counts[k])
        if rate <= 0.0:
            break
        rate += _left_by_decodes(m, k, to_s, to_s) / (to_s - m.clock_s[k])
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


@njit(cache=True)
def with_time_freed(m: MirrorArrays, k: int, dues: FloatArray) -> FloatArray:
    """Due times with the time added that decodes leave before them, as the planner counts it."""
    rate = rate_beside(m, k, m.counts[k])
    if rate <= 0.0:
        return dues
    at_s, freed = m.freed_at_s[k], m.freed_tokens[k]
    # At the first due time both parts are known; later ones have more of the first.
    left = _left_by_decodes(m, k, dues[0], dues[0]) - _at(at_s, freed, dues[0])
    later = np.empty(len(dues))
    for i in range(len(dues)):
        later[i] = dues[i] + (left + _at(at_s, freed, dues[i])) / rate
    return later
