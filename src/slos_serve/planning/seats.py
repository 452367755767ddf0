"""Seats (``max_num_seqs``) over time: how many requests can have started by each moment.

A seat that comes free is given to whoever is due next. Free are those that no promised request has and those that
promised ones leave when their answers end; each of these is given on when the answer that took it ends. A request needs
a seat by the time its prompt must start, and Algorithm 1 counts starts as it counts prefill tokens. Best effort counts
for nothing: it gives way.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.perf.step_time import per_token_s
from slos_serve.planning.demand import Demand
from slos_serve.planning.memory import SPREAD, own_pace_s
from slos_serve.planning.state import ADMITTED, FloatArray, State
from slos_serve.planning.supply import MOMENT_TOKENS

# Times that a seat is counted to be given on before the last moment.
MOST_TURNS = 16


@njit(cache=True)
def seats_by(state: State, demand: Demand, pace_s: float, taken: FloatArray) -> FloatArray:
    """float64 [M]: of the requests that need a seat, how many can have started by each moment.

    Args:
        pace_s: the pace that moments count in, see :func:`slos_serve.planning.supply.pace_of_moments_s`.
        taken: float64 [2, M], of the seats that promised requests have those still taken at each moment, and the
            variance of that; see :func:`slos_serve.planning.memory.forecast`.
    """
    have, most = 0.0, float(state.max_num_seqs)
    for slot in state.running:
        have += 1.0 if state.status[slot] == ADMITTED else 0.0
    free: FloatArray = np.maximum(most - np.minimum(taken[0] + SPREAD * np.sqrt(taken[1]), have), 0.0)
    starting, turn_s = 0, 0.0
    for j in range(len(demand.slots)):
        if demand.needs_seat[j] > 0.0:
            slot = demand.slots[j]
            tokens = max(state.rows["expected_tokens"][slot] - state.rows["output_tokens"][slot], 1)
            turn_s += demand.tokens[j] * per_token_s(state.coefficients) + tokens * own_pace_s(state.rows, slot, pace_s)
            starting += 1
    if starting == 0:
        return free
    turn_s /= starting
    moments_s, seats = MOMENT_TOKENS * pace_s, free.copy()
    for turn in range(1, MOST_TURNS):
        before_s = moments_s - turn * turn_s
        if before_s[-1] < 0.0:
            break
        seats += np.where(before_s >= 0.0, np.interp(before_s, moments_s, free), 0.0)
    return seats
