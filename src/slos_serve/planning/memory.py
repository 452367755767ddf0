"""KV memory that promises will need (design 4.3).

A request holds its prompt and what it generated, and grows until its answer ends. Two ways to count: :func:`reserve`
adds up every forecast peak; :func:`forecast` looks at several moments and counts each request by how likely it still
runs then, so that room which some give back is promised to others. Best effort counts for nothing: it gives way.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.planning.batch import blocks_for
from slos_serve.planning.candidates import ADMITTED, tokens_to_do
from slos_serve.planning.lengths import share_left, survives
from slos_serve.planning.prefill_rate import FloatArray

# Moments at which memory is forecast, in tokens of the tightest pace from now.
CHECKPOINT_TOKENS = (0.0, 16.0, 48.0, 128.0, 320.0, 768.0)
# When nobody promises a TPOT the moments need some pace.
UNPROMISED_PACE_S = 0.1
# Standard deviations of the requests' own ends kept free at each moment.
SPREAD = 1.0


@njit(cache=True)
def peak_blocks(rows: RequestArray, slot: int, block_size: int) -> int:
    """Blocks a request holds when its forecast last token comes."""
    tokens = rows["prompt_tokens"][slot] + max(rows["expected_tokens"][slot], rows["output_tokens"][slot])
    return blocks_for(tokens, block_size)


@njit(cache=True)
def reserve(
    rows: RequestArray, running: SlotArray, candidates: SlotArray, total_blocks: int, block_size: int
) -> tuple[FloatArray, FloatArray]:
    """Blocks each candidate will need, and what promised decodes leave of the cache.

    Returns:
        memory (float64 [n, 1]) and room (float64 [1]), in blocks.
    """
    room = np.empty(1)
    room[0] = total_blocks
    for slot in running:
        if rows["status"][slot] != ADMITTED:
            continue  # gives way, or stands among the candidates
        if rows["output_tokens"][slot] > 0 and tokens_to_do(rows, slot) <= 1:
            room[0] -= peak_blocks(rows, slot, block_size)
    memory = np.empty((len(candidates), 1))
    for j in range(len(candidates)):
        memory[j, 0] = peak_blocks(rows, candidates[j], block_size)
    return memory, room


@njit(cache=True)
def still_runs(rows: RequestArray, slot: int, more: float, survival: FloatArray, edges: FloatArray) -> float:
    """Probability that a request generates ``more`` tokens after those it has.

    A client's hint is taken at its word while it holds. Past every length seen, half as much again is expected.
    """
    return share_left(rows, slot, more, survives(survival, edges, float(rows["output_tokens"][slot])), survival, edges)


@njit(cache=True)
def _blocks_at(rows: RequestArray, slot: int, more: float, later: float, block_size: int) -> float:
    """Blocks of a request that has generated ``more`` tokens after those it has, and is on its way to ``later``.

    Where the client said how long its answer is, nothing but the next moment bounds what it holds until then: between
    two moments it grows and may end, and the sum over all requests peaks just before an end. Where lengths are guessed
    the spread of the guesses covers that.
    """
    held = rows["prompt_tokens"][slot] + rows["output_tokens"][slot]
    if rows["hint_tokens"][slot] > rows["output_tokens"][slot]:
        left = rows["hint_tokens"][slot] - rows["output_tokens"][slot]
        return float(blocks_for(held + int(min(later, left)), block_size))
    return float((held + more) / block_size + 0.5)


@njit(cache=True)
def forecast(
    rows: RequestArray,
    running: SlotArray,
    candidates: SlotArray,
    due_s: FloatArray,
    now_s: float,
    pace_s: float,
    survival: FloatArray,
    edges: FloatArray,
    total_blocks: int,
    block_size: int,
) -> tuple[FloatArray, FloatArray]:
    """Blocks each candidate is expected to hold at several moments, and what promised decodes leave then.

    Everyone is taken to decode as slowly as its promise allows, and a candidate to begin when its first token is due:
    whoever is faster gives its room back sooner. Moments at which all candidates fit together are left out, but for
    one, so that they cost admission nothing.

    Args:
        rows: the request table, forecasts written.
        running: slots that hold KV.
        candidates, due_s: int64 and float64 [n], as :func:`slos_serve.planning.candidates.gather` has them.
        now_s: when the plan begins.
        pace_s: shortest TPOT, inf when there is none; the moments are multiples of it.
        survival: float64 [classes, bins + 1], see :meth:`slos_serve.planning.lengths.LengthForecast.survival`.
        edges: float64 [bins].
        total_blocks, block_size: the KV cache.

    Returns:
        memory (float64 [n, K]) and room (float64 [K]), in blocks.
    """
    if not np.isfinite(pace_s):
        pace_s = UNPROMISED_PACE_S
    moments = len(CHECKPOINT_TOKENS)
    last = moments - 1
    memory = np.zeros((len(candidates), moments))
    used, variance = np.zeros(moments), np.zeros(moments)
    for slot in running:
        if rows["status"][slot] != ADMITTED or rows["output_tokens"][slot] == 0 or tokens_to_do(rows, slot) > 1:
            continue
        tokens_a_pace = pace_s / rows["tpot_s"][slot]
        own = survival[rows["class_index"][slot]]
        so_far = survives(own, edges, float(rows["output_tokens"][slot]))
        for k in range(moments):
            more, later = CHECKPOINT_TOKENS[k] * tokens_a_pace, CHECKPOINT_TOKENS[min(k + 1, last)] * tokens_a_pace
            share = share_left(rows, slot, more, so_far, own, edges)
            if share <= 0.0:
                break  # it has ended, at every later moment too
            blocks = _blocks_at(rows, slot, more, later, block_size)
            used[k] += share * blocks
            variance[k] += share * (1.0 - share) * blocks * blocks
    room = total_blocks - used - SPREAD * np.sqrt(variance)
    slack = room.copy()
    for j in range(len(candidates)):
        slot = candidates[j]
        wait_s = max(due_s[j] - now_s, 0.0)
        own = survival[rows["class_index"][slot]]
        so_far = survives(own, edges, float(rows["output_tokens"][slot]))
        for k in range(moments):
            more = max(CHECKPOINT_TOKENS[k] * pace_s - wait_s, 0.0) / rows["tpot_s"][slot]
            later = max(CHECKPOINT_TOKENS[min(k + 1, last)] * pace_s - wait_s, 0.0) / rows["tpot_s"][slot]
            share = share_left(rows, slot, more, so_far, own, edges)
            memory[j, k] = share * _blocks_at(rows, slot, more, later, block_size)
            slack[k] -= memory[j, k]
    binding = np.flatnonzero(slack < 0.0)
    if len(binding) == 0:
        binding = np.array([np.argmin(slack)])
    return memory[:, binding], room[binding]
