"""Seats (``max_num_seqs``) over time: how many requests can have started by each moment.

A seat is given to whoever is due next as soon as one comes free: those that are free now, those that promised decodes
leave when their answers end, and these once more when the answers that took them end. What a request needs is one seat
by the time its prompt must start; Algorithm 1 counts starts as it counts prefill tokens. Best effort counts for
nothing: it gives way.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.perf.jit import in_place
from slos_serve.perf.lengths import share_left, survives
from slos_serve.perf.step_time import per_token_s
from slos_serve.planning.demand import Demand
from slos_serve.planning.memory import SPREAD
from slos_serve.planning.state import ADMITTED, FloatArray, State, is_decode
from slos_serve.planning.supply import MOMENT_TOKENS

# Times that a seat is counted to be given on before the last moment.
MOST_TURNS = 16
# Nobody's end is forecast while this many times those who run and ask would find a seat.
PLENTY = 2


@in_place
def finite_or(pace_s: float, other_s: float) -> float:
    """A pace, or the other where there is none."""
    return float(pace_s if np.isfinite(pace_s) else other_s)


@in_place
def add_seat(state: State, slot: int, wait_s: float, pace_s: float, survival: FloatArray, held: FloatArray) -> None:
    """Add the probability that a request with a seat still holds it at each moment, and its variance; float64 [2, M].

    Args:
        wait_s: seconds until it begins to decode.
        pace_s: what the moments count in. A request without a TPOT promise is taken to have it.
    """
    own, own_s = survival[state.rows["class_index"][slot]], finite_or(state.rows["tpot_s"][slot], pace_s)
    so_far = survives(own, float(state.rows["output_tokens"][slot]))
    for k in range(len(MOMENT_TOKENS)):
        more = max(MOMENT_TOKENS[k] * pace_s - wait_s, 0.0) / own_s
        share = share_left(state.rows, slot, more, so_far, own)
        if share <= 0.0:
            break
        held[0, k] += share
        held[1, k] += share * (1.0 - share)


@njit(cache=True)
def seats_by(state: State, demand: Demand, pace_s: float, survival: FloatArray) -> FloatArray:
    """float64 [M]: of the requests that need a seat, how many can have started by each moment.

    Args:
        pace_s: the pace that moments count in, see :func:`slos_serve.planning.supply.pace_of_moments_s`.
        survival: float64 [classes, bins + 1], see :meth:`slos_serve.perf.lengths.LengthForecast.survival`.
    """
    moments_s = MOMENT_TOKENS * pace_s
    held, have = np.zeros((2, len(moments_s))), 0.0
    for slot in state.running:
        have += 1.0 if state.status[slot] == ADMITTED else 0.0
    most = float(state.max_num_seqs)
    if PLENTY * (have + len(demand.slots)) <= most:
        plenty: FloatArray = np.full(len(moments_s), most - have)
        return plenty
    for slot in state.running:
        if state.status[slot] == ADMITTED and is_decode(state.rows, slot):
            add_seat(state, slot, 0.0, pace_s, survival, held)
    starting, turn_s = 0, 0.0
    for j in range(len(demand.slots)):
        slot = demand.slots[j]
        if demand.needs_seat[j] == 0.0:
            add_seat(state, slot, demand.due_s[j] - state.now_s, pace_s, survival, held)
            continue
        tokens = max(state.rows["expected_tokens"][slot] - state.rows["output_tokens"][slot], 1)
        own_s = finite_or(state.rows["tpot_s"][slot], pace_s)
        turn_s += demand.tokens[j] * per_token_s(state.coefficients) + tokens * own_s
        starting += 1
    free: FloatArray = np.maximum(most - np.minimum(held[0] + SPREAD * np.sqrt(held[1]), have), 0.0)
    if starting == 0:
        return free
    turn_s /= starting
    seats: FloatArray = free.copy()
    for turn in range(1, MOST_TURNS):
        before_s = moments_s - turn * turn_s
        if before_s[-1] < 0.0:
            break
        seats += np.where(before_s >= 0.0, np.interp(before_s, moments_s, free), 0.0)
    return seats
