"""What an engine can give to prompts: prefill tokens a second beside its decodes, and KV blocks.

A batch of length T carries, for each decode tier, ``count * T / period`` verifications; the rest of the tokens that fit
into T is prefill. Longer batches pay fewer fixed costs, so T is the shortest period among the tiers that run, or the
longest step where that is shorter. Decodes that are ahead of their deadlines, or about to end, lend more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray
from slos_serve.perf.jit import in_place
from slos_serve.perf.lengths import share_left, survives
from slos_serve.perf.step_time import decode_s, per_token_s, roofline_s, roofline_tokens
from slos_serve.planning.state import ADMITTED, FloatArray, State, is_decode, next_due_s
from slos_serve.planning.tiers import tier_of

# Moments of the plan's future, in tokens of the tightest pace: what decodes lend and hold in KV is reckoned for these.
MOMENT_TOKENS = np.array([0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0])


# Share of the KV in use from which on it begins to be short, and at which it is what limits the engine.
KV_SHORT_FROM, KV_SHORT = 0.7, 0.9


@in_place
def kv_shortage(state: State) -> float:
    """0 while KV is plenty, 1 where it is what limits the engine."""
    used = 1.0 - state.free_blocks / max(state.total_blocks, 1)
    return float(min(max((used - KV_SHORT_FROM) / (KV_SHORT - KV_SHORT_FROM), 0.0), 1.0))


class Supply(NamedTuple):
    """What is left for prompts.

    Attributes:
        coefficients: float64 [8], batch times as they are planned.
        max_tokens: most tokens of a batch.
        draft_s: sequential seconds of the draft model a batch.
        start_s: when prefill begins.
        counts: float64 [L], promised decodes that run, by tier.
        periods_s: float64 [L], longest time between two batches that carry a decode of the tier.
        tokens_each: float64 [L], tokens that a decode of the tier puts into a period.
        extra_s_each: float64 [L], seconds beside the roofline part that it adds to a period.
        blocks: float64 [K], KV blocks left at K moments.
        moments_s: float64 [M], ascending.
        lent_tokens: float64 [M], prefill tokens that running decodes lend until each of these moments.
        seats: float64 [M], requests that can have started by each of them, see :mod:`slos_serve.planning.seats`.
    """

    coefficients: FloatArray
    max_tokens: float
    draft_s: float
    start_s: float
    counts: FloatArray
    periods_s: FloatArray
    tokens_each: FloatArray
    extra_s_each: FloatArray
    blocks: FloatArray
    moments_s: FloatArray
    lent_tokens: FloatArray
    seats: FloatArray


@in_place
def prefill_rate(
    counts: FloatArray,
    periods_s: FloatArray,
    tokens_each: FloatArray,
    extra_s_each: FloatArray,
    draft_s: float,
    coefficients: FloatArray,
    max_tokens: float,
) -> float:
    """Prefill tokens a second beside ``counts`` decodes; negative when the decodes alone do not fit.

    Arguments are the fields of :class:`Supply`, unpacked because inner loops call this.
    """
    step_s = roofline_s(coefficients, max_tokens) + draft_s
    for tier in range(len(counts)):
        if counts[tier] > 0.0:
            step_s = min(step_s, periods_s[tier])
    decode_tokens, fixed_s = 0.0, draft_s
    for tier in range(len(counts)):
        if counts[tier] > 0.0:
            share = counts[tier] * step_s / periods_s[tier]
            decode_tokens += share * tokens_each[tier]
            fixed_s += share * extra_s_each[tier]
    return (roofline_tokens(coefficients, step_s - fixed_s, max_tokens) - decode_tokens) / step_s


@in_place
def rate_beside(counts: FloatArray, supply: Supply) -> float:
    """:func:`prefill_rate` of a supply with other counts."""
    return float(
        prefill_rate(
            counts,
            supply.periods_s,
            supply.tokens_each,
            supply.extra_s_each,
            supply.draft_s,
            supply.coefficients,
            supply.max_tokens,
        )
    )


@in_place
def pace_of_moments_s(state: State, paces_s: FloatArray) -> float:
    """The tightest promised pace; without one, the pace that the running decodes have: the length of their batch."""
    if np.isfinite(paces_s[0]):
        return float(paces_s[0])
    seconds, count = 0.0, 0.0
    for slot in state.running:
        if is_decode(state.rows, slot):
            seconds += decode_s(state.coefficients, 0.0, state.rows["computed_tokens"][slot])
            count += 1.0
    return float(roofline_s(state.coefficients, max(count, 1.0)) + seconds)


@in_place
def spare_s(state: State, slot: int, start_s: float) -> float:
    """How long a promised decode can be held from ``start_s`` on before it asks for a token every TPOT; -1 if none."""
    rows = state.rows
    if state.status[slot] != ADMITTED or not is_decode(rows, slot):
        return -1.0
    return float(max(next_due_s(rows, slot, state.margin) - start_s - rows["tpot_s"][slot], 0.0))


@njit(cache=True)
def lend(state: State, supply: Supply, paces_s: FloatArray, survival: FloatArray, first_due_s: float) -> FloatArray:
    """float64 [M]: prefill tokens that running decodes do not take until each moment.

    The rate counts a token every TPOT for each decode. A decode that is ahead of its deadlines can be held until its
    next token is due; a decode whose answer ends needs no more tokens. Until the first of the prompts may end
    (``first_due_s``), steps beside held decodes also last longer and pay fewer fixed costs.
    """
    slope, moments_s, start_s = per_token_s(state.coefficients), supply.moments_s, supply.start_s
    rate = rate_beside(supply.counts, supply)
    lent = np.zeros(len(moments_s))
    asking, own = np.zeros((len(moments_s), len(paces_s))), np.zeros(len(moments_s))
    spans_s = np.maximum(moments_s - start_s, 0.0)
    for slot in state.running:
        tpot_s, held_s = state.rows["tpot_s"][slot], spare_s(state, slot, start_s)
        if held_s < 0.0:
            continue
        tier = tier_of(paces_s, tpot_s)
        for k in range(len(moments_s)):
            if spans_s[k] > held_s:
                asking[k, tier] += 1.0
            elif np.isfinite(tpot_s):
                own[k] += (1.0 + supply.extra_s_each[tier] / slope) / tpot_s
        if np.isfinite(tpot_s):
            each = 1.0 + decode_s(state.coefficients, 0.0, state.rows["computed_tokens"][slot]) / slope
            add_lent(state.rows, slot, held_s, spans_s, survival, each, lent)
    if rate <= 0.0:
        return np.zeros(len(moments_s))
    gained, from_s = 0.0, start_s
    for k in range(len(moments_s)):
        until_s = min(moments_s[k], max(first_due_s, start_s))
        if until_s > from_s:
            gained += (until_s - from_s) * max(rate_beside(asking[k], supply) - rate - own[k], 0.0)
            from_s = until_s
        lent[k] += gained
    return lent


@in_place
def add_lent(
    rows: RequestArray,
    slot: int,
    held_s: float,
    spans_s: FloatArray,
    survival: FloatArray,
    each: float,
    lent: FloatArray,
) -> None:
    """Add what one decode lends within each span (float64 [M]): ``each`` for every token that it does not ask for."""
    tpot_s, own = rows["tpot_s"][slot], survival[rows["class_index"][slot]]
    so_far = survives(own, float(rows["output_tokens"][slot]))
    for k in range(len(spans_s)):
        held = min(held_s, spans_s[k])
        rest, ended = (spans_s[k] - held) / tpot_s, 0.0
        if rest > 0.0:
            # The share that has ended grows about evenly from none when the lead is used up.
            ended = 0.5 * (1.0 - share_left(rows, slot, rest, so_far, own))
        lent[k] += each * (held / tpot_s + rest * ended)
