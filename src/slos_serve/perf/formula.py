"""The batch-time formula (docs/batch-time-model.md), for scalars, arrays and kernels alike.

Without numba: commands that start vLLM's CPU workers may not have it loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Positions of the coefficients in the array that kernels take.
K_C, B_C, K_M, B_M, K_CTX, K_Q, K_SEQ, K_S = range(8)
NUM_COEFFICIENTS = 8


def features_s(
    coefficients: NDArray[np.float64] | tuple[float, ...],
    tokens: Any,
    context: Any,
    units: Any,
    sampled: Any,
    draft_steps: Any,
) -> Any:
    """Seconds of batches of ``tokens`` new tokens: numbers, or arrays of equal length.

    Args:
        coefficients: float64 [8].
        tokens, context, units, sampled, draft_steps: see :attr:`slos_serve.perf.batch_time.BatchShape.features`.
    """
    compute = coefficients[K_C] * tokens + coefficients[B_C]
    memory = coefficients[K_M] * tokens + coefficients[B_M]
    requests_s = coefficients[K_CTX] * context + coefficients[K_Q] * units + coefficients[K_SEQ] * sampled
    return np.maximum(compute, memory) + requests_s + coefficients[K_S] * draft_steps
