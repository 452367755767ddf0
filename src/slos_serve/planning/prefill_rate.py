"""How many prefill tokens a second are left beside the decodes that run (design 4.1).

A batch of length T carries, for every decode tier, ``count * T / period`` verifications; what is left of the tokens
that fit in T is prefill budget. Longer batches spread the fixed cost over more tokens, so the best T is the shortest
period among the tiers that run, or the time of a full batch where that is shorter.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.perf.batch_time import B_C, B_M, K_C, K_M

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@njit(cache=True)
def linear_step_s(coefficients: FloatArray, tokens: float) -> float:
    """Seconds of the roofline part of a batch of ``tokens`` new tokens."""
    compute = coefficients[K_C] * tokens + coefficients[B_C]
    memory = coefficients[K_M] * tokens + coefficients[B_M]
    return float(max(compute, memory))


@njit(cache=True)
def linear_tokens(coefficients: FloatArray, room_s: float, max_tokens: float) -> float:
    """Tokens whose roofline part takes ``room_s``; negative when even the fixed cost does not fit."""
    tokens = max_tokens
    if coefficients[K_C] > 0.0:
        tokens = min(tokens, (room_s - coefficients[B_C]) / coefficients[K_C])
    if coefficients[K_M] > 0.0:
        tokens = min(tokens, (room_s - coefficients[B_M]) / coefficients[K_M])
    return tokens


@njit(cache=True)
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

    Args:
        counts: float64 [L], decodes in each tier.
        periods_s: float64 [L], longest time between two batches that carry a decode of the tier (TPOT, times the
            tokens a verification yields under speculation); ``inf`` for a tier without a TPOT promise.
        tokens_each: float64 [L], new tokens that one decode puts into a batch (1, or draft length + 1).
        extra_s_each: float64 [L], seconds beyond the roofline part that one decode adds to a batch (context, request).
        draft_s: sequential seconds of the draft model a batch.
        coefficients: float64 [8], see :mod:`slos_serve.perf.batch_time`.
        max_tokens: most tokens a batch may hold.
    """
    step_s = linear_step_s(coefficients, max_tokens) + draft_s
    for tier in range(len(counts)):
        if counts[tier] > 0.0:
            step_s = min(step_s, periods_s[tier])
    decode_tokens = 0.0
    fixed_s = draft_s
    for tier in range(len(counts)):
        if counts[tier] > 0.0:
            share = counts[tier] * step_s / periods_s[tier]
            decode_tokens += share * tokens_each[tier]
            fixed_s += share * extra_s_each[tier]
    return (linear_tokens(coefficients, step_s - fixed_s, max_tokens) - decode_tokens) / step_s
