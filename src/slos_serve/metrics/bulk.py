"""Scores many requests at once from one flat array of token times: the definitions of ``attainment``, vectorised.

A request here may have several calls (rounds of a tool loop): it attains when every one of them does. Calls that never
came because an earlier one was rejected or lost leave the request missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
# Token times are kept as float32 after the arrival: a microsecond of slack covers their rounding at an hour.
_ROUNDING_S = 1e-6
_ROUNDING_SHARE = 1e-6
# Bounds the memory of intermediate arrays; what a call scores does not depend on it.
_CALLS_AT_ONCE = 4096


@dataclass(frozen=True)
class CallTargets:
    """What each call was promised; float64 [calls] in seconds, ``inf`` where nothing is.

    Attributes:
        ttft_s: first token.
        tpot_s: mean of the first stage.
        next_tpot_s: mean of the second stage.
        e2e_s: last token.
        first_stage_tokens: int64 [calls], tokens of the first stage; at least the answer's when there is one stage.
    """

    ttft_s: Floats
    tpot_s: Floats
    next_tpot_s: Floats
    e2e_s: Floats
    first_stage_tokens: Ints


@dataclass(frozen=True)
class CallScores:
    """How each call fared; arrays [calls], meaningless where not ``completed``.

    Attributes:
        completed: all of its tokens came.
        ttft_s, tpot_s: first token after arrival, and mean time per output token after it (nan below two tokens).
        longest_stall_s: longest gap between two of its tokens.
        ttft_met, tpot_met, e2e_met: promises of the first token, of every stage's mean, of the complete answer.
        strict: every token in time.
    """

    completed: Bools
    ttft_s: Floats
    tpot_s: Floats
    longest_stall_s: Floats
    ttft_met: Bools
    tpot_met: Bools
    e2e_met: Bools
    strict: Bools

    @property
    def attained(self) -> Bools:
        """bool [calls]: completed, first token, every stage and the last token in time."""
        return np.asarray(self.completed & self.ttft_met & self.tpot_met & self.e2e_met)


def score_calls(
    token_s: NDArray[np.float32], token_start: Ints, output_tokens: Ints, completed: Bools, targets: CallTargets
) -> CallScores:
    """Score calls whose tokens lie one call after the other.

    Args:
        token_s: float32 [all tokens], times after the call's arrival; nan where none came.
        token_start: int64 [calls], first token of each.
        output_tokens: int64 [calls], tokens of each, all 1 or more.
        completed: bool [calls].
        targets: what was promised.
    """
    if len(token_start) == 0:
        nothing = np.empty(0)
        none = np.empty(0, dtype=np.bool_)
        return CallScores(none, nothing, nothing, nothing, none, none, none, none)
    parts = []
    for first in range(0, len(token_start), _CALLS_AT_ONCE):
        rows = slice(first, first + _CALLS_AT_ONCE)
        begin = int(token_start[first])
        end = int(token_start[rows][-1] + output_tokens[rows][-1])
        some = CallTargets(*(getattr(targets, name)[rows] for name in targets.__dataclass_fields__))
        own_start = token_start[rows] - begin
        parts.append(_score(token_s[begin:end], own_start, output_tokens[rows], completed[rows], some))
    return CallScores(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in CallScores.__dataclass_fields__)
    )


def _score(
    token_s: NDArray[np.float32], token_start: Ints, output_tokens: Ints, completed: Bools, targets: CallTargets
) -> CallScores:
    """Scores of a few calls; works on arrays as long as their tokens."""
    times = token_s.astype(np.float64)
    last = token_start + output_tokens - 1
    split = np.minimum(targets.first_stage_tokens, output_tokens)
    first_end, second_start = token_start + split - 1, np.minimum(token_start + split, last)
    ttft_s = times[token_start]
    two_stages = split < output_tokens
    tpot_met = _mean_met(times, token_start, first_end, targets.tpot_s)
    tpot_met &= ~two_stages | _mean_met(times, second_start, last, targets.next_tpot_s)
    ttft_met = ttft_s <= targets.ttft_s * (1.0 + _ROUNDING_SHARE) + _ROUNDING_S
    e2e_met = times[last] <= targets.e2e_s * (1.0 + _ROUNDING_SHARE) + _ROUNDING_S
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot_s = (times[last] - times[token_start]) / (output_tokens - 1)
    gaps = np.diff(times, prepend=times[:1])
    gaps[token_start] = 0.0
    every_token = _every_token_met(times, token_start, output_tokens, split, targets)
    return CallScores(
        completed=completed,
        ttft_s=ttft_s,
        tpot_s=np.where(output_tokens > 1, tpot_s, np.nan),
        longest_stall_s=np.maximum.reduceat(gaps, token_start),
        ttft_met=np.asarray(ttft_met),
        tpot_met=np.asarray(tpot_met),
        e2e_met=np.asarray(e2e_met),
        strict=np.asarray(completed & ttft_met & every_token & e2e_met),
    )


def requests_attained(call_attained: Bools, session: Ints, num_requests: int) -> Bools:
    """bool [requests]: every call of the session attained."""
    missed = np.bincount(session[~call_attained], minlength=num_requests)
    return np.asarray(missed == 0)


def attained_by_quartile(attained: Bools, prompt_tokens: Ints) -> list[float]:
    """Share of requests that attained in each quartile of prompt length, short to long; nan for an empty one."""
    if len(attained) == 0:
        return [float("nan")] * 4
    edges = np.quantile(prompt_tokens, (0.25, 0.5, 0.75))
    quartile = np.searchsorted(edges, prompt_tokens, side="left")
    return [float(attained[quartile == q].mean()) if np.any(quartile == q) else float("nan") for q in range(4)]


def _mean_met(times: Floats, first: Ints, last: Ints, tpot_s: Floats) -> Bools:
    spans = last - first
    with np.errstate(invalid="ignore"):
        allowed = np.where(spans > 0, tpot_s * spans, np.inf)
    return np.asarray((spans <= 0) | (times[last] - times[first] <= allowed * (1.0 + _ROUNDING_SHARE) + _ROUNDING_S))


def _every_token_met(times: Floats, token_start: Ints, output_tokens: Ints, split: Ints, targets: CallTargets) -> Bools:
    owner = np.repeat(np.arange(len(token_start)), output_tokens)
    position = np.arange(len(times)) - token_start[owner]
    second = position >= split[owner]
    base = np.where(second, token_start[owner] + split[owner], token_start[owner])
    allowed = np.where(second, targets.next_tpot_s[owner], targets.tpot_s[owner])
    steps = np.arange(len(times)) - base
    with np.errstate(invalid="ignore"):
        due = np.where(steps > 0, allowed * steps, np.inf)
    late = times - times[base] > due * (1.0 + _ROUNDING_SHARE) + _ROUNDING_S
    return np.asarray(np.bincount(owner[late], minlength=len(token_start)) == 0)
