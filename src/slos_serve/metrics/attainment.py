"""Scores one request from its token times.

Decides what "kept its promise" means, for the simulator and the load client alike. Assumes that all times of a request
share one clock and that tokens which arrived together carry the same time: a token counts when its reader has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slos_serve.core.slo import SLOClass, Stage

# Slack against rounding when two sums of the same floats are compared; far below any clock that is read.
_ROUNDING_S = 1e-9


@dataclass(frozen=True, slots=True)
class StageTarget:
    """What one stage must keep, in seconds; ``inf`` where nothing is promised."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Score:
    """How one request fared.

    Attributes:
        num_tokens: output tokens received.
        ttft_s: from arrival to the first token; ``nan`` when none came.
        tpot_s: mean time per output token after the first, over all stages; ``nan`` below two tokens.
        longest_stall_s: longest gap between two tokens; 0 below two tokens.
        ttft_met: the first token came in time.
        tpot_met: the mean TPOT of every stage is at or under its target.
        e2e_met: the last token came in time.
        strict: the first token, the last one and every token k in time, by t_first + k * TPOT within each stage.
    """

    num_tokens: int
    ttft_s: float
    tpot_s: float
    longest_stall_s: float
    ttft_met: bool
    tpot_met: bool
    e2e_met: bool
    strict: bool

    @property
    def attained(self) -> bool:
        """Every stage and the complete answer kept their promises."""
        return self.ttft_met and self.tpot_met and self.e2e_met


def score_request(
    arrival_s: float,
    token_times_s: ArrayLike,
    targets: Sequence[StageTarget],
    stage_starts: Sequence[int] = (0,),
    e2e_s: float = math.inf,
) -> Score:
    """Score a finished request.

    Args:
        arrival_s: when the request was sent.
        token_times_s: float [n], when each output token arrived, not decreasing.
        targets: one or more, in stage order; the TTFT of the first one counts.
        stage_starts: index of the first token of each stage that was reached, rising, beginning with 0.
        e2e_s: promised seconds from arrival to the last token.
    """
    times = np.asarray(token_times_s, dtype=np.float64)
    count = len(times)
    if count == 0:
        by_stage = any(math.isfinite(value) for target in targets for value in (target.ttft_s, target.tpot_s))
        promised = by_stage or math.isfinite(e2e_s)
        return Score(0, math.nan, math.nan, 0.0, not by_stage, True, not math.isfinite(e2e_s), not promised)
    ttft_s = float(times[0]) - arrival_s
    ttft_met = ttft_s <= targets[0].ttft_s + _ROUNDING_S
    e2e_met = float(times[-1]) - arrival_s <= e2e_s + _ROUNDING_S
    ends = (*stage_starts[1:], count)
    stages = [times[start:end] for start, end in zip(stage_starts, ends, strict=True)]
    limits = [target.tpot_s for target in targets[: len(stages)]]
    tpot_met = all(_mean_tpot_met(stage, limit) for stage, limit in zip(stages, limits, strict=True))
    every_token = all(_every_token_met(stage, limit) for stage, limit in zip(stages, limits, strict=True))
    return Score(
        num_tokens=count,
        ttft_s=ttft_s,
        tpot_s=tpot_of(times),
        longest_stall_s=float(np.diff(times).max()) if count > 1 else 0.0,
        ttft_met=ttft_met,
        tpot_met=tpot_met,
        e2e_met=e2e_met,
        strict=ttft_met and every_token and e2e_met,
    )


def tpot_of(times_s: NDArray[np.float64]) -> float:
    """Mean time per output token after the first, (t_last - t_first) / (n - 1); ``nan`` below two tokens."""
    return float(times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else math.nan


def targets_of(slo_class: SLOClass | None, zero_load_s: float) -> tuple[StageTarget, ...]:
    """Targets of every stage of a class; ``None`` promises nothing.

    Args:
        slo_class: the class as the request got it, its own numbers applied.
        zero_load_s: time of its prompt alone on the engine, for a TTFT given as a slowdown.
    """
    if slo_class is None:
        return (StageTarget(),)
    ttft_s = slo_class.slo.ttft_s(zero_load_s)
    first = StageTarget(ttft_s, slo_class.slo.tpot_s)
    return (first, *(StageTarget(tpot_s=stage.slo.tpot_s) for stage in slo_class.stages[1:]))


def stage_starts_of(stages: Sequence[Stage], num_tokens: int, token_ids: Sequence[int] | None = None) -> list[int]:
    """Index of the first token of each stage that was reached.

    A stage ends after ``max_tokens`` of its tokens or with its ``end_token_id``, whichever comes first; without
    ``token_ids`` only counts end stages.
    """
    starts = [0]
    for stage in stages[:-1]:
        start = starts[-1]
        end = num_tokens if stage.max_tokens is None else min(num_tokens, start + stage.max_tokens)
        if stage.end_token_id is not None and token_ids is not None:
            ids = list(token_ids[start:end])
            end = start + ids.index(stage.end_token_id) + 1 if stage.end_token_id in ids else end
        if end >= num_tokens:
            break
        starts.append(end)
    return starts


def _mean_tpot_met(times_s: NDArray[np.float64], tpot_s: float) -> bool:
    return len(times_s) <= 1 or float(times_s[-1] - times_s[0]) <= tpot_s * (len(times_s) - 1) + _ROUNDING_S


def _every_token_met(times_s: NDArray[np.float64], tpot_s: float) -> bool:
    if len(times_s) <= 1 or math.isinf(tpot_s):
        return True
    return bool(np.all(times_s - times_s[0] <= tpot_s * np.arange(len(times_s)) + _ROUNDING_S))
