"""Decode tiers: requests of about one pace, counted together.

A tier is charged at the tightest pace in it. Classes have few paces and each gets a tier of its own; complete answers
have any, and a wide tier would charge a decode for many times the tokens that it asks for. So the bounds of the tiers
are those that charge the fewest tokens too many.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import SlotArray
from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import decode_s
from slos_serve.planning.state import ADMITTED, AHEAD_TOKENS, BEST_EFFORT, FloatArray, State, is_decode

MAX_TIERS = 4
# Paces within this ratio are taken for one. It is squared until no more than so many are left to choose bounds from.
SAME_PACE, MOST_PACES = 1.05, 32


class Tiers(NamedTuple):
    """Decode tiers of the requests that are promised something or may be; float64 [L] each.

    Attributes:
        tpot_s: TPOT of each tier, ascending.
        counts: promised decodes that run.
        ahead: share of these that have gained their lead, see ``AHEAD_TOKENS``.
        decodes: decodes that run, promised or not yet.
        in_tier: requests that the two means below are of.
        extra_s: seconds beside the roofline part that a decode adds to a batch, context half of what is to come.
        acceptance: mean acceptance of drafts.
    """

    tpot_s: FloatArray
    counts: FloatArray
    ahead: FloatArray
    decodes: FloatArray
    in_tier: FloatArray
    extra_s: FloatArray
    acceptance: FloatArray


@njit(cache=True)
def distinct(ordered_s: FloatArray, ratio: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Paces that differ by more than ``ratio``, the tightest of each; how many requests, and how many tokens a second
    they ask for, before each of them and in all.

    Args:
        ordered_s: float64 [n], ascending, 1 or more.

    Returns:
        float64 [m], float64 [m + 1], float64 [m + 1].
    """
    firsts = np.empty(len(ordered_s), dtype=np.int64)
    count, last_s = 0, -np.inf
    for j in range(len(ordered_s)):
        if ordered_s[j] != last_s and ordered_s[j] > ratio * last_s:
            firsts[count], last_s = j, ordered_s[j]
            count += 1
    asked = np.append(0.0, np.cumsum(1.0 / ordered_s))
    bounds = np.append(firsts[:count], len(ordered_s))
    return ordered_s[firsts[:count]], bounds.astype(np.float64), asked[bounds]


@njit(cache=True)
def fewest_too_many(paces_s: FloatArray, before: FloatArray, asked: FloatArray) -> FloatArray:
    """float64 [L]: the tightest pace of each of ``MAX_TIERS`` tiers that charge the fewest tokens too many; arguments
    as :func:`distinct` returns them."""
    n = len(paces_s)
    tiers = min(MAX_TIERS, n)
    charged, begins = np.full((tiers + 1, n + 1), np.inf), np.zeros((tiers + 1, n + 1), dtype=np.int64)
    charged[0, 0] = 0.0
    for tier in range(1, tiers + 1):
        for end in range(tier, n + 1):
            for begin in range(tier - 1, end):
                more = (before[end] - before[begin]) / paces_s[begin] - (asked[end] - asked[begin])
                if charged[tier - 1, begin] + more < charged[tier, end]:
                    charged[tier, end], begins[tier, end] = charged[tier - 1, begin] + more, begin
    found, end = np.empty(tiers), n
    for tier in range(tiers, 0, -1):
        end = begins[tier, end]
        found[tier - 1] = paces_s[end]
    return found


@njit(cache=True)
def tier_paces(state: State, asking: SlotArray) -> FloatArray:
    """float64 [L]: the tightest TPOT of each tier among requests with or without an open promise, ascending."""
    found = np.empty(len(state.running) + len(asking))
    count = 0
    for part in (state.running, asking):
        for slot in part:
            if state.status[slot] != BEST_EFFORT:
                found[count] = state.rows["tpot_s"][slot]
                count += 1
    if count == 0:
        return np.full(1, np.inf)
    ordered_s, ratio = np.sort(found[:count]), SAME_PACE
    paces_s, before, asked = distinct(ordered_s, ratio)
    while len(paces_s) > MOST_PACES:
        ratio *= ratio
        paces_s, before, asked = distinct(ordered_s, ratio)
    return fewest_too_many(paces_s, before, asked)


@in_place
def tier_of(paces_s: FloatArray, tpot_s: float) -> int:
    """The loosest tier that is at least as tight as ``tpot_s``."""
    found = 0
    for j in range(len(paces_s)):
        if paces_s[j] <= tpot_s:
            found = j
    return found


@njit(cache=True)
def tiers_of(state: State, asking: SlotArray, acceptance: FloatArray) -> Tiers:
    """Tiers of the running and the ``asking`` requests. Where nobody may be promised anything, best effort is one.

    Args:
        acceptance: float64 [classes].
    """
    tpot_s, rows = tier_paces(state, asking), state.rows
    counts, ahead, decodes, in_tier, context, accepted = np.zeros((6, len(tpot_s)))
    for with_best_effort in (False, True):
        if in_tier.sum() > 0.0:
            break
        for part in (state.running, asking):
            for slot in part:
                if state.status[slot] == BEST_EFFORT and not with_best_effort:
                    continue
                tier = tier_of(tpot_s, rows["tpot_s"][slot])
                grown = 0.5 * (rows["output_tokens"][slot] + rows["expected_tokens"][slot])
                context[tier] += rows["prompt_tokens"][slot] + grown
                accepted[tier] += acceptance[rows["class_index"][slot]]
                in_tier[tier] += 1.0
                if is_decode(rows, slot):
                    decodes[tier] += 1.0
                    if state.status[slot] == ADMITTED:
                        counts[tier] += 1.0
                        ahead[tier] += 1.0 if rows["stage_tokens"][slot] * state.margin >= AHEAD_TOKENS else 0.0
    each, extra_s = np.maximum(in_tier, 1.0), np.empty(len(tpot_s))
    for tier in range(len(tpot_s)):
        extra_s[tier] = decode_s(state.coefficients, 0.0, context[tier] / each[tier])
    return Tiers(tpot_s, counts, ahead / np.maximum(counts, 1.0), decodes, in_tier, extra_s, accepted / each)
