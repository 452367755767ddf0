"""What recent requests ask for: how soon their first token, and how much prefill."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.planning.candidates import prompt_cost_tokens
from slos_serve.planning.prefill_rate import FloatArray

# Doubles what is taken for the tightest TTFT after 70 arrivals that asked for less.
TTFT_LOOSENS = 1.01
# The mean prompt is that of about as many requests.
RECENT_PROMPTS = 64


class Arrivals(NamedTuple):
    """Of the recent requests.

    Attributes:
        newest: ``order`` of the last one counted.
        tightest_s: tightest TTFT: a minimum that loosens by a little with each request that is not as tight.
        mean_tokens: mean prefill of a request in tokens, attention counted in, what the prefix cache has left out.
        num_prompts: how many that is the mean of.
    """

    newest: int
    tightest_s: float
    mean_tokens: float
    num_prompts: int


NO_ARRIVALS = Arrivals(-1, float(np.inf), 0.0, 0)


@njit(cache=True)
def look_at(rows: RequestArray, waiting: SlotArray, coefficients: FloatArray, known: Arrivals) -> Arrivals:
    """``known`` with those among ``waiting`` that are new counted."""
    newest, tightest_s, mean, count = known
    for slot in waiting:
        if rows["order"][slot] > known.newest:
            newest = max(newest, int(rows["order"][slot]))
            tightest_s = min(tightest_s * TTFT_LOOSENS, rows["ttft_due_s"][slot] - rows["arrival_s"][slot])
            count = min(count + 1, RECENT_PROMPTS)
            mean += (prompt_cost_tokens(rows, slot, coefficients) - mean) / count
    return Arrivals(newest, tightest_s, mean, count)
