"""What recent arrivals ask for: how soon their first token, and how much of the engine's time their prompts take.

Only requests that could still be promised count: one whose TTFT is hopeless changes nothing for the others. What is
known fades with time, so a quiet engine forgets a crowd. How tight TTFTs are is not forgotten while it is idle: with
clumps of requests and long rests between them, the short prompts of each clump would come too late to a long step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import roofline_s
from slos_serve.planning.demand import SIZES, prompt_tokens_left, size_of
from slos_serve.planning.state import BEST_EFFORT, FloatArray, State, weight_of

# The tightest TTFT known doubles within this time of work when nothing as tight arrives.
DOUBLES_S = 30.0
# Prompt time asked for is averaged over this time.
LOAD_OVER_S = 30.0
# The steps of prompts that a newcomer waits for take at most this share of the tightest TTFT together, so that it is in
# time by steps of its own: the one that runs, and where steps are planned ahead the one that is planned already. A step
# takes at least this many times its fixed cost, or fixed costs would take most of the time.
STEP_SHARE_OF_TTFT, LEAST_STEP_FIXED = 0.5, 4.0


class Arrivals(NamedTuple):
    """Of the recent requests.

    Attributes:
        newest: ``order`` of the last one counted.
        at_s: when these numbers were right.
        tightest_s: tightest TTFT asked for; inf before any.
        load: float64 [2, SIZES], prefill tokens a second that requests of each size ask for; and these times TTFT, the
            tokens that have come and are not due yet.
    """

    newest: int
    at_s: float
    tightest_s: float
    load: FloatArray


NO_ARRIVALS = Arrivals(-1, 0.0, float(np.inf), np.zeros((2, SIZES)))


@njit(cache=True)
def count_arrivals(state: State, known: Arrivals) -> Arrivals:
    """``known`` moved on to now, with those among the waiting that are new counted."""
    passed_s = max(state.now_s - known.at_s, 0.0)
    was_idle = len(state.running) == 0 and (state.rows["order"][state.waiting] > known.newest).all()
    newest, tightest_s = known.newest, known.tightest_s * 2.0 ** (0.0 if was_idle else passed_s / DOUBLES_S)
    load = known.load * np.exp(-passed_s / LOAD_OVER_S)
    for slot in state.waiting:
        order = state.rows["order"][slot]
        if order <= known.newest:
            continue
        newest = max(newest, int(order))
        if state.status[slot] == BEST_EFFORT:
            continue
        ttft_s = state.rows["ttft_due_s"][slot] - state.rows["arrival_s"][slot]
        tightest_s = min(tightest_s, ttft_s)
        tokens = prompt_tokens_left(state.rows, slot, state.coefficients)
        size = size_of(tokens / weight_of(state, slot))
        load[0, size] += tokens / LOAD_OVER_S
        load[1, size] += tokens / LOAD_OVER_S * ttft_s
    return Arrivals(newest, state.now_s, tightest_s, load)


@in_place
def longest_step_s(state: State, arrivals: Arrivals) -> float:
    """Longest a step of prompts may take, for the sake of those that arrive meanwhile."""
    share = STEP_SHARE_OF_TTFT / (2.0 if state.plan_ahead else 1.0)
    return float(max(share * arrivals.tightest_s, LEAST_STEP_FIXED * roofline_s(state.coefficients, 0.0)))
