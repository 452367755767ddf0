"""When a refused request is to ask again: once its replica is forecast to have room for it.

The mirror is moved on as time would move it: owed prompts are computed at the planner's own rate, and decodes end as
fast as answers of this length do at the pace that they really run at. The mirror then judges the same request as if it
came later. The rooms that open one after another are given out one after another, so a burst that is refused does not
come back at one moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slos_serve.perf.step_time import roofline_s
from slos_serve.planning.state import FloatArray
from slos_serve.routing import mirror_kernel as kernel
from slos_serve.routing.mirror_arrays import MirrorArrays, advance
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.router import RoutingRequest, row_of

SOONEST_S = 1.0
LATEST_S = 60.0
UNKNOWN_S = 5.0
# The time between two looks at a mirror, and the share of the time without a room that it is at least.
LEAST_STEP_S, GROWTH = 0.25, 0.1
# So many rooms are looked for; those after them are taken to open as fast.
MOST_ROOMS = 16
# Most rooms of a replica before LATEST_S.
MOST_TOLD = 2000
# Of a fleet only so many replicas are looked at; the others are taken to be like them.
MOST_REPLICAS = 8
# A forecast of rooms is used for this long.
FRESH_S = 0.25
# Rooms that open at the same look are this far apart, so that each is given out once.
APART_S = 1e-6


class RetryTimes:
    """Tells refused requests when to ask again, each a later time than the one before.

    Args:
        mirrors: the replicas.
    """

    def __init__(self, mirrors: Mirrors) -> None:
        self._mirrors = mirrors
        self._told_s = -math.inf
        self._rooms: dict[tuple[int, ...], FloatArray] = {}
        self._counted_s = -math.inf

    def next_s(self, now_s: float, asked: RoutingRequest, stale_after_s: float) -> float:
        """Seconds until the request is to ask again, in [1, 60].

        Args:
            now_s: present time on the router's clock.
            asked: the request that is refused.
            stale_after_s: a replica that has not published for this long is not counted on.
        """
        positions = np.flatnonzero(self._mirrors.usable(now_s, stale_after_s)).tolist()
        if not positions:
            return UNKNOWN_S
        after_s = self._forecast(now_s, asked, positions)
        at = int(np.searchsorted(after_s, self._told_s - self._counted_s + 0.5 * APART_S, side="right"))
        found_s = float(after_s[at]) if at < len(after_s) else LATEST_S
        self._told_s = min(max(self._counted_s + found_s, self._told_s), now_s + LATEST_S)
        return float(min(max(self._told_s - now_s, SOONEST_S), LATEST_S))

    def _forecast(self, now_s: float, asked: RoutingRequest, positions: Sequence[int]) -> FloatArray:
        """:func:`rooms_after_s` of all replicas; what was forecast just now for a request like this one holds."""
        if not 0.0 <= now_s - self._counted_s < FRESH_S:
            self._rooms, self._counted_s = {}, now_s
        like = (asked.class_index, asked.prompt_tokens.bit_length(), asked.max_tokens.bit_length())
        found = self._rooms.get(like)
        if found is None:
            some = positions[:: -(-len(positions) // MOST_REPLICAS)]
            each = [rooms_after_s(self._counted_s, asked, self._mirrors, k) for k in some]
            found = np.repeat(np.sort(np.concatenate(each)), round(len(positions) / len(some)))
            found = self._rooms[like] = found + APART_S * np.arange(len(found))
        return found


def rooms_after_s(now_s: float, asked: RoutingRequest, mirrors: Mirrors, k: int) -> FloatArray:
    """float64 [rooms], ascending: seconds from now after which replica ``k`` can promise one more request like this.

    Each is taken to come as soon as there is room for it. Rooms after :data:`LATEST_S` are left out.
    """
    m = _copy_with_room(mirrors.arrays, k)
    tokens = float(m.forecast_tokens[0, min(asked.class_index, m.forecast_tokens.shape[1] - 1), 0])
    tokens = float(asked.hint_tokens or max(min(tokens, asked.max_tokens), 1.0))
    cached = min(asked.cached.get(mirrors.name_of(k), 0), asked.prompt_tokens - 1)
    found: list[float] = []
    after_s, opened_s, at_s = 0.0, 0.0, max(now_s, float(m.clock_s[0]))
    while len(found) < MOST_ROOMS and after_s < LATEST_S:
        after_s = min(after_s + max(LEAST_STEP_S, GROWTH * (after_s - opened_s)), LATEST_S)
        before_s, at_s = at_s, max(now_s + after_s, at_s)
        _end_decodes(m, tokens, at_s - before_s)
        advance(m, 0, at_s)
        row = row_of(_later(asked, now_s + after_s - asked.arrival_s))
        while len(found) < MOST_ROOMS and kernel.ask(m, 0, row, cached)[0] == kernel.BESIDE:
            kernel.enter(m, 0, row, cached)
            found.append(after_s)
            opened_s = after_s
    if len(found) < MOST_ROOMS:
        return np.array(found)
    # The first ones may be there all at once; later ones open as fast as prompts are computed or decodes end.
    half = MOST_ROOMS // 2
    gap_s = max((found[-1] - found[-1 - half]) / half, LATEST_S / MOST_TOLD)
    return np.concatenate((np.array(found), np.arange(found[-1] + gap_s, LATEST_S, gap_s)))


def _later(asked: RoutingRequest, by_s: float) -> RoutingRequest:
    return replace(
        asked,
        arrival_s=asked.arrival_s + by_s,
        ttft_due_s=asked.ttft_due_s + by_s,
        answer_due_s=asked.answer_due_s + by_s,
    )


def _copy_with_room(m: MirrorArrays, k: int) -> MirrorArrays:
    """Mirror ``k`` alone, with places for :data:`MOST_ROOMS` more owed prompts.

    What its running decodes lend, and the seats they leave, are left out: both count on their ends, and here they end.
    """
    first, count = int(m.first[k]), int(m.num_owed[k])
    alone = MirrorArrays._make(part[k : k + 1].copy() for part in m)
    owed = {}
    for name in ("due_s", "cost_tokens", "tier", "weight", "needs_seat", "begun", "memory"):
        part = getattr(m, name)[k, first : first + count]
        owed[name] = np.zeros((1, count + MOST_ROOMS, *part.shape[1:]), dtype=part.dtype)
        owed[name][0, :count] = part
    alone.first[0] = 0
    alone.lent_tokens[0], alone.seats[0] = 0.0, m.seats[k, 0]
    return alone._replace(**owed)


def _end_decodes(m: MirrorArrays, tokens: float, span_s: float) -> None:
    """Let decodes of ``tokens`` tokens each end for ``span_s`` seconds, evenly spread, and free memory and seats."""
    counts, owed = m.counts[0], slice(m.first[0], m.first[0] + m.num_owed[0])
    if span_s <= 0.0 or counts.sum() <= 0.0:
        return
    alone_s = roofline_s(m.coefficients[0], counts.sum()) + float((counts * m.extra_s_each[0]).sum())
    # While prompts are owed, steps are filled with them.
    step_s = roofline_s(m.coefficients[0], m.max_step_tokens[0]) if m.num_owed[0] else alone_s
    token_s = np.minimum(step_s / m.tokens_each[0], m.pace_s[0])
    left = np.exp(-span_s / np.maximum(tokens * token_s, 1e-9))
    before = counts.sum()
    counts *= left
    held = np.maximum(m.total_blocks[0] - m.memory_left[0] - m.memory[0, owed].sum(axis=0), 0.0)
    m.memory_left[0] += held * (1.0 - counts.sum() / before)
    m.seats[0] += before - counts.sum()
