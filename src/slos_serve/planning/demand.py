"""Who asks for prefill: requests that are promised something, and those that may be.

From the state to a :class:`Demand`. Requests that cannot attain any more are given up first. Of the waiting requests
only the most urgent are put before admission, so a long queue costs a selection and no more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import alone_s, per_token_s, request_s
from slos_serve.planning.state import (
    ADMITTED,
    BEST_EFFORT,
    UNDECIDED,
    BoolArray,
    FloatArray,
    IntArray,
    State,
    is_decode,
    next_due_s,
    tokens_done,
    tokens_left,
    weight_of,
)
from slos_serve.planning.tiers import tier_of

# Waiting requests that admission looks at in one plan.
MOST_ASKING = 256
# Size classes of prompts, each twice as long as the one before.
SIZES = 24
# With weights by length, a prompt of this length weighs what its class says.
UNIT_PROMPT_TOKENS = 1000.0


class Demand(NamedTuple):
    """Requests with prefill left, in the order of their deadlines.

    Attributes:
        slots: int64 [n].
        due_s: float64 [n], when the first token is due.
        tokens: float64 [n], prefill left, attention counted in.
        tier: int64 [n], decode tier that each enters.
        blocks: float64 [n, K], KV blocks each needs at K moments.
        weight: float64 [n], value of admitting each.
        promised: bool [n], must be served.
        needs_seat: float64 [n], 1 where a request has no seat (``max_num_seqs``) yet that no other may take.
    """

    slots: SlotArray
    due_s: FloatArray
    tokens: FloatArray
    tier: IntArray
    blocks: FloatArray
    weight: FloatArray
    promised: BoolArray
    needs_seat: FloatArray


@in_place
def is_lost(state: State, slot: int) -> bool:
    """Whether a promise can no longer be kept.

    A first token is lost when the prompt, alone on the engine, would end late. A decode stage is lost when all its
    forecast tokens, each as fast as a batch can be, would not bring its mean back to the target.
    """
    rows, coefficients, now_s = state.rows, state.coefficients, state.now_s
    if rows["missed"][slot] == 1 or rows["tpot_s"][slot] <= 0.0:
        return True
    if rows["output_tokens"][slot] == 0:
        left = float(max(tokens_left(rows, slot), 1))
        return bool(now_s + alone_s(coefficients, left, tokens_done(rows, slot)) > rows["ttft_due_s"][slot])
    if rows["stage_tokens"][slot] == 0 or not np.isfinite(rows["promised_tpot_s"][slot]):
        return False
    fastest_s, tpot_s = alone_s(coefficients, 1.0, 0.0), rows["promised_tpot_s"][slot]
    late_s = now_s + fastest_s - (rows["stage_start_s"][slot] + rows["stage_tokens"][slot] * tpot_s)
    left = rows["expected_tokens"][slot] - rows["output_tokens"][slot]
    return bool(late_s > 0.0 and late_s > (left - 1) * (tpot_s - fastest_s))


@njit(cache=True)
def give_up_lost(state: State) -> SlotArray:
    """Turn requests whose promise is lost into best effort; returns them."""
    lost = np.empty(len(state.running) + len(state.waiting), dtype=np.int64)
    count = 0
    for part in (state.running, state.waiting):
        for slot in part:
            if state.status[slot] != BEST_EFFORT and is_lost(state, slot):
                state.status[slot] = BEST_EFFORT
                lost[count] = slot
                count += 1
    return lost[:count]


@njit(cache=True)
def most_urgent(state: State, most: int = MOST_ASKING) -> SlotArray:
    """Waiting slots that admission looks at: all promised ones, and the ``most`` undecided ones that are due first."""
    waiting, due_s = state.waiting, state.rows["ttft_due_s"]
    status = state.status[waiting]
    asking = waiting[status == UNDECIDED]
    if len(asking) > most:
        latest_s = np.partition(due_s[asking], most - 1)[most - 1]
        asking = asking[due_s[asking] <= latest_s][:most]
    return np.concatenate((waiting[status == ADMITTED], asking))


@in_place
def prompt_tokens_left(rows: RequestArray, slot: int, coefficients: FloatArray) -> float:
    """Prefill left of a request in tokens: those to compute, and as many as its attention takes the time of."""
    left = max(tokens_left(rows, slot), 1)
    own_s = request_s(coefficients, float(left), float(tokens_done(rows, slot)))
    return float(left + own_s / per_token_s(coefficients))


@in_place
def size_of(tokens: float) -> int:
    """Size class of a prompt: its tokens, for a unit of weight, to the next power of two."""
    return int(min(max(np.ceil(np.log2(max(tokens, 1.0))), 0.0), SIZES - 1.0))


@in_place
def due_before(load: FloatArray, size: int, span_s: float) -> float:
    """Prefill tokens of requests smaller than ``size`` that are to arrive, and to be served, within ``span_s``."""
    tokens = 0.0
    for smaller in range(size):
        tokens += max(load[0, smaller] * span_s - load[1, smaller], 0.0)
    return tokens


@njit(cache=True)
def build_demand(
    state: State,
    asking: SlotArray,
    paces_s: FloatArray,
    max_implied_ttft_s: float,
    length_weight: float,
    load: FloatArray,
) -> Demand:
    """Requests with prefill left among the running and the ``asking`` ones; ``blocks`` is left empty.

    Args:
        asking: waiting slots, see :func:`most_urgent`.
        paces_s: float64 [L], see :func:`slos_serve.planning.tiers.tier_paces`.
        max_implied_ttft_s: deadline of a request that has none of its own, after its arrival.
        length_weight: power of the prompt's length that weights are multiplied with.
        load: float64 [2, SIZES], see :class:`slos_serve.planning.arrivals.Arrivals`. A request that is not promised yet
            is charged for the cheaper ones that are to come and are due before its deadline: a promise made now would
            take their time. Who weighs less than 1 is charged as many times more, so that a promise worth little is
            made only where even a crowd would leave room for it.
    """
    rows, most = state.rows, len(state.running) + len(asking)
    slots, tier = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    due_s, tokens, weight, needs_seat = np.empty((4, most))
    promised = np.empty(most, dtype=np.bool_)
    n = 0
    for part in (state.running, asking):
        for slot in part:
            status = state.status[slot]
            if status == BEST_EFFORT or (status == ADMITTED and is_decode(rows, slot)):
                continue
            due = next_due_s(rows, slot, state.margin)
            if due == np.inf:
                due = rows["arrival_s"][slot] + max_implied_ttft_s
            slots[n], due_s[n] = slot, max(due, state.now_s)
            tokens[n] = prompt_tokens_left(rows, slot, state.coefficients)
            tier[n] = tier_of(paces_s, rows["tpot_s"][slot])
            weight[n] = weight_of(state, slot)
            if length_weight > 0.0:
                weight[n] *= (rows["prompt_tokens"][slot] / UNIT_PROMPT_TOKENS) ** length_weight
            promised[n] = state.status[slot] == ADMITTED
            needs_seat[n] = 0.0 if promised[n] and rows["running"][slot] == 1 else 1.0
            if not promised[n]:
                to_come = due_before(load, size_of(tokens[n] / weight[n]), due_s[n] - state.now_s)
                tokens[n] += to_come / min(rows["weight"][slot], 1.0)
            n += 1
    order = np.argsort(due_s[:n], kind="mergesort")
    return Demand(
        slots[:n][order],
        due_s[:n][order],
        tokens[:n][order],
        tier[:n][order],
        np.empty((n, 0)),
        weight[:n][order],
        promised[:n][order],
        needs_seat[:n][order],
    )
