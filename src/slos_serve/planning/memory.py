"""KV memory that promises will need, and seats (``max_num_seqs``) that are taken, forecast at several moments.

A request holds its prompt and its answer so far, and grows until the answer ends. Each request counts by how likely it
still runs at a moment, so room that some give back is promised to others. One that has not started holds nothing until
it must. Best effort counts for nothing: it gives way.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray
from slos_serve.perf.jit import in_place
from slos_serve.perf.lengths import share_left, survives
from slos_serve.perf.step_time import alone_s
from slos_serve.planning.demand import Demand
from slos_serve.planning.state import ADMITTED, FloatArray, State, blocks_for, is_decode, tokens_done, tokens_left
from slos_serve.planning.supply import MOMENT_TOKENS

# Standard deviations of the running requests' own ends that stay free at each moment.
SPREAD = 1.0


@in_place
def blocks_at(rows: RequestArray, slot: int, more: float, later: float, block_size: int) -> float:
    """Blocks of a request that has generated ``more`` tokens after those it has, on its way to ``later``.

    With a client's hint the end is known, and the request may grow until the next moment. Where lengths are guessed,
    the spread of the guesses covers that growth.
    """
    fixed = rows["fixed_blocks"][slot]
    held = rows["prompt_tokens"][slot] + rows["output_tokens"][slot]
    left = rows["hint_tokens"][slot] - rows["output_tokens"][slot]
    if left > 0:
        return float(fixed + blocks_for(held + int(min(later, left)), block_size))
    return float(fixed + (held + more) / block_size + 0.5)


@in_place
def start_in_s(state: State, slot: int, wait_s: float) -> float:
    """Seconds until a request holds KV, when its first token is due in ``wait_s``: now where it has some, else when its
    prompt must start, alone on the engine."""
    rows = state.rows
    if rows["running"][slot] == 1 or rows["computed_tokens"][slot] > 0:
        return 0.0
    prompt_s = alone_s(state.coefficients, float(tokens_left(rows, slot)), tokens_done(rows, slot))
    return float(max(wait_s - prompt_s, 0.0))


@in_place
def own_pace_s(rows: RequestArray, slot: int, pace_s: float) -> float:
    """The pace that a request is promised; ``pace_s`` where it is promised none."""
    return float(rows["tpot_s"][slot] if np.isfinite(rows["tpot_s"][slot]) else pace_s)


@in_place
def add_held(
    state: State,
    slot: int,
    wait_s: float,
    pace_s: float,
    survival: FloatArray,
    blocks: FloatArray,
    variance: FloatArray,
    seats: FloatArray,
) -> None:
    """Add what one request is expected to hold at each moment.

    Args:
        wait_s: seconds until it begins to decode.
        pace_s: tightest pace, which the moments count in.
        blocks, variance: float64 [M], KV blocks and their variance.
        seats: float64 [2, M], its seat and the variance of that.
    """
    rows, last = state.rows, len(MOMENT_TOKENS) - 1
    own_s = own_pace_s(rows, slot, pace_s)
    own = survival[rows["class_index"][slot]]
    so_far = survives(own, float(rows["output_tokens"][slot]))
    later, starts_s = max(MOMENT_TOKENS[0] * pace_s - wait_s, 0.0) / own_s, start_in_s(state, slot, wait_s)
    for k in range(last + 1):
        next_s = MOMENT_TOKENS[min(k + 1, last)] * pace_s
        more, later = later, max(next_s - wait_s, 0.0) / own_s
        if next_s < starts_s:
            continue
        share = share_left(rows, slot, more, so_far, own)
        if share <= 0.0:
            break  # it has ended, at every later moment too
        held = blocks_at(rows, slot, more, later, state.block_size)
        blocks[k] += share * held
        variance[k] += share * (1.0 - share) * held * held
        seats[0, k] += share
        seats[1, k] += share * (1.0 - share)


@njit(cache=True)
def forecast(
    state: State, demand: Demand, pace_s: float, survival: FloatArray, total_blocks: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Blocks each request in demand is expected to hold at several moments, and what promised decodes leave then.

    A request is taken to start its prompt as late and to decode as slowly as its promise allows; a faster one gives its
    room back sooner. Moments at which all requests fit together are left out, but for one, so that they cost
    admission nothing.

    Args:
        pace_s: the pace that moments count in, see :func:`slos_serve.planning.supply.pace_of_moments_s`.
        survival: float64 [classes, bins + 1], see :meth:`slos_serve.perf.lengths.LengthForecast.survival`.
        total_blocks: of the KV cache, less what is kept for others.

    Returns:
        blocks (float64 [n, K]), room (float64 [K]); and of the seats that promised requests have, how many are still
        taken at each moment and the variance of that (float64 [2, M]).
    """
    used, seats, not_yet = np.zeros((3, 2, len(MOMENT_TOKENS)))
    for slot in state.running:
        if state.status[slot] == ADMITTED and is_decode(state.rows, slot):
            add_held(state, slot, 0.0, pace_s, survival, used[0], used[1], seats)
    room = total_blocks - used[0] - SPREAD * np.sqrt(used[1])
    blocks = np.zeros((len(demand.slots), len(MOMENT_TOKENS)))
    slack = room.copy()
    for j in range(len(demand.slots)):
        wait_s = max(demand.due_s[j] - state.now_s, 0.0)
        taken = not_yet if demand.needs_seat[j] > 0.0 else seats
        add_held(state, demand.slots[j], wait_s, pace_s, survival, blocks[j], used[1], taken)
        slack -= blocks[j]
    binding = np.flatnonzero(slack < 0.0)
    if len(binding) == 0:
        binding = np.array([np.argmin(slack)])
    return blocks[:, binding], room[binding], seats
