"""Prefill budget that running decodes leave, beyond what counting a token every TPOT for each of them gives.

Decodes that are ahead of their deadlines can be held, answers end, and steps beside decodes that are all held last
longer and pay fewer fixed costs. Admission turns these tokens into later due times; replicas publish them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.batch_time import K_C, K_CTX, K_M, K_SEQ
from slos_serve.planning.candidates import ADMITTED, next_due_s, tier_of, tokens_to_do
from slos_serve.planning.lengths import share_left, survives
from slos_serve.planning.prefill_rate import FloatArray, prefill_rate

# Moments at most for which it is reckoned one by one.
FREED_MOMENTS = 8


@njit(cache=True)
def _lead_s(rows: RequestArray, slot: int, start_s: float, tpot_margin: float) -> float:
    """How long a promised decode can be held from ``start_s`` on before it asks for a token every TPOT; -1 if none."""
    if rows["status"][slot] != ADMITTED or rows["output_tokens"][slot] == 0 or tokens_to_do(rows, slot) > 1:
        return -1.0
    return float(max(next_due_s(rows, slot, tpot_margin) - start_s - rows["tpot_s"][slot], 0.0))


@njit(cache=True)
def tokens_gained(
    rows: RequestArray,
    running: SlotArray,
    moments_s: FloatArray,
    start_s: float,
    periods_s: FloatArray,
    tokens_each: FloatArray,
    extra_s_each: FloatArray,
    max_tokens: float,
    rate: float,
    coefficients: FloatArray,
    tpot_margin: float,
) -> FloatArray:
    """Prefill tokens gained until each moment because steps last longer while decodes can be held (float64 [M]).

    A step beside decodes that ask for tokens ends with the tightest of their periods, and each pays a fixed cost. Until
    a decode has used up its lead it bounds no step. What its own tokens cost is not counted here.

    Args:
        moments_s: float64 [M], ascending; a decode counts as held between two of them when it is until the later.
        periods_s, tokens_each, extra_s_each, max_tokens: as :func:`prefill_rate` has them.
        rate: prefill tokens a second beside all running decodes.
    """
    count = len(moments_s)
    asking, own = np.zeros((count, len(periods_s))), np.zeros(count)
    slope = max(coefficients[K_C], coefficients[K_M])
    for slot in running:
        lead_s = _lead_s(rows, slot, start_s, tpot_margin)
        if lead_s < 0.0:
            continue
        level = tier_of(periods_s, rows["tpot_s"][slot])
        cost = 1.0 + extra_s_each[level] / slope
        for i in range(count):
            if lead_s < moments_s[i] - start_s:
                asking[i, level] += 1.0
            elif np.isfinite(rows["tpot_s"][slot]):
                own[i] += cost / rows["tpot_s"][slot]
    gained, total, from_s = np.zeros(count), 0.0, start_s
    for i in range(count):
        span_s = moments_s[i] - from_s
        if 0.0 < span_s < np.inf:
            then = prefill_rate(asking[i], periods_s, tokens_each, extra_s_each, 0.0, coefficients, max_tokens)
            total += span_s * max(then - rate - own[i], 0.0)
            from_s = moments_s[i]
        gained[i] = total
    return gained


@njit(cache=True)
def tokens_freed(
    rows: RequestArray,
    running: SlotArray,
    moments_s: FloatArray,
    start_s: float,
    coefficients: FloatArray,
    tpot_margin: float,
    survival: FloatArray,
    edges: FloatArray,
) -> FloatArray:
    """Prefill tokens that running decodes do not take until each moment, because they can be held or have ended.

    Admission counts a token every TPOT for each decode. One that is ahead of its deadlines can be held until its next
    token is due, and one whose answer ends needs no more.

    Args:
        moments_s: float64 [M].
    """
    slope = max(coefficients[K_C], coefficients[K_M])
    spans_s = np.maximum(moments_s - start_s, 0.0)
    freed = np.zeros(len(moments_s))
    for slot in running:
        tpot_s = rows["tpot_s"][slot]
        lead_s = _lead_s(rows, slot, start_s, tpot_margin)
        if lead_s < 0.0 or not np.isfinite(tpot_s):
            continue
        own = survival[rows["class_index"][slot]]
        cost = 1.0 + (coefficients[K_CTX] * rows["computed_tokens"][slot] + coefficients[K_SEQ]) / slope
        so_far = survives(own, edges, float(rows["output_tokens"][slot]))
        for i in range(len(moments_s)):
            held_s = min(lead_s, spans_s[i])
            rest_s = spans_s[i] - held_s
            ended = 0.0
            if rest_s > 0.0:
                # The share that has ended grows about evenly from none when the lead is used up.
                ended = 0.5 * (1.0 - share_left(rows, slot, rest_s / tpot_s, so_far, own, edges))
            freed[i] += cost / tpot_s * (held_s + rest_s * ended)
    return freed


@njit(cache=True)
def with_time_freed(
    rows: RequestArray,
    running: SlotArray,
    due_s: FloatArray,
    start_s: float,
    periods_s: FloatArray,
    tokens_each: FloatArray,
    extra_s_each: FloatArray,
    max_tokens: float,
    rate: float,
    coefficients: FloatArray,
    tpot_margin: float,
    survival: FloatArray,
    edges: FloatArray,
) -> FloatArray:
    """Due times with the time added that running decodes leave to prompts before them (float64 [n], order kept).

    What decodes do not take until a deadline (:func:`tokens_freed`) is prefill budget, and at the rate of the plan's
    start worth some seconds. Until the first of the prompts may be done, and with it a decode that nobody can hold,
    steps beside held decodes also last longer (:func:`tokens_gained`).

    Args:
        rate: as of :func:`tokens_gained`; nothing is added where none is left.
    """
    if rate <= 0.0 or len(due_s) == 0:
        return due_s
    # Looked at for some due times, in between it grows about evenly.
    looked = np.unique(np.linspace(0, len(due_s) - 1, min(len(due_s), FREED_MOMENTS)).astype(np.int64))
    freed = tokens_freed(rows, running, due_s[looked], start_s, coefficients, tpot_margin, survival, edges)
    gained = tokens_gained(
        rows,
        running,
        np.linspace(start_s, max(due_s[0], start_s), FREED_MOMENTS + 1)[1:],
        start_s,
        periods_s,
        tokens_each,
        extra_s_each,
        max_tokens,
        rate,
        coefficients,
        tpot_margin,
    )
    later: FloatArray = due_s + (np.interp(due_s, due_s[looked], freed) + gained[-1]) / rate
    return later
