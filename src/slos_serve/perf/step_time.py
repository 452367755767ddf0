"""The parts of the batch-time formula as kernels, and its inverse (docs/batch-time-model.md).

    batch = max(k_c * n + b_c, k_m * n + b_m) + sum over requests of request_s + k_s * longest draft

``n`` are the new tokens of the batch. A request costs ``k_seq`` for each token that it samples (one, and one for each
draft to verify), ``k_ctx`` for each token of its context and ``k_q`` for the attention within its chunk. The fit, the
planner, the simulator and the bounds call these functions; none of them has a formula of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slos_serve.perf.formula import B_C, B_M, K_C, K_CTX, K_M, K_Q, K_S, K_SEQ, features_s
from slos_serve.perf.jit import in_place

FloatArray = NDArray[np.float64]
# Tokens that a batch without a limit may hold.
UNBOUNDED_TOKENS = 1e12
_features_s = in_place(features_s)


@in_place
def roofline_s(coefficients: FloatArray, tokens: float) -> float:
    """Seconds of the part of a batch that depends on its number of new tokens alone."""
    return float(_features_s(coefficients, tokens, 0.0, 0.0, 0.0, 0.0))


@in_place
def roofline_tokens(coefficients: FloatArray, room_s: float, most: float) -> float:
    """Inverse of :func:`roofline_s`, at most ``most``; negative when not even the fixed cost fits."""
    tokens = most
    for branch in range(2):
        slope = coefficients[K_C] if branch == 0 else coefficients[K_M]
        left_s = room_s - (coefficients[B_C] if branch == 0 else coefficients[B_M])
        if slope > 0.0:
            tokens = min(tokens, left_s / slope)
        elif left_s < 0.0:
            tokens = min(tokens, -1.0)
    return tokens


@in_place
def per_token_s(coefficients: FloatArray) -> float:
    """Seconds of one more token in a full batch."""
    return float(max(coefficients[K_C], coefficients[K_M]))


@in_place
def attention_units(tokens: float, done: float) -> float:
    """``tokens * (tokens + 2 * done)`` of a prefill chunk after ``done`` computed tokens; 0 for a single token."""
    return tokens * (tokens + 2.0 * done) if tokens > 1.0 else 0.0


@in_place
def request_s(coefficients: FloatArray, tokens: float, done: float) -> float:
    """Seconds that a request with ``tokens`` new tokens after ``done`` adds to a batch beside its roofline part."""
    own = coefficients[K_SEQ] + coefficients[K_CTX] * done
    return float(own + coefficients[K_Q] * attention_units(tokens, done))


@in_place
def decode_s(coefficients: FloatArray, drafts: float, done: float) -> float:
    """As :func:`request_s` for a decode that verifies ``drafts`` drafts: each is sampled like a token of its own."""
    return float(coefficients[K_SEQ] * (1.0 + drafts) + coefficients[K_CTX] * done)


@in_place
def batch_s(coefficients: FloatArray, tokens: float, requests_s: float, draft_steps: float) -> float:
    """Seconds of a batch, given its new tokens and the sum of its :func:`request_s`; 0 for an empty one."""
    if tokens <= 0.0:
        return 0.0
    return float(roofline_s(coefficients, tokens) + requests_s + coefficients[K_S] * draft_steps)


@in_place
def alone_s(coefficients: FloatArray, tokens: float, done: float) -> float:
    """Seconds of a batch that holds one request."""
    return batch_s(coefficients, tokens, request_s(coefficients, tokens, done), 0.0)


@in_place
def largest_chunk(coefficients: FloatArray, room_s: float, tokens: float, done: float) -> float:
    """Most prefill tokens of a request with which a batch ends in time; ``UNBOUNDED_TOKENS`` without a bound.

    Args:
        coefficients: float64 [8].
        room_s: how long the batch may last less the :func:`request_s` and draft seconds of everything in it.
        tokens: new tokens in it already.
        done: tokens of this request computed before.
    """
    if not np.isfinite(room_s):
        return UNBOUNDED_TOKENS
    square, largest = coefficients[K_Q], UNBOUNDED_TOKENS
    left_s = room_s - coefficients[K_SEQ] - coefficients[K_CTX] * done
    for branch in range(2):
        slope = coefficients[K_C] if branch == 0 else coefficients[K_M]
        constant = coefficients[B_C] if branch == 0 else coefficients[B_M]
        own_s = left_s - constant - slope * tokens
        if own_s <= 0.0:
            return 0.0
        linear = slope + 2.0 * square * done
        if square > 0.0:
            largest = min(largest, 2.0 * own_s / (np.sqrt(linear * linear + 4.0 * square * own_s) + linear))
        elif linear > 0.0:
            largest = min(largest, own_s / linear)
    return float(np.floor(largest + 1e-9))
