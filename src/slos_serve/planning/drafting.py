"""Draft lengths from plan to plan: what is known of acceptance, the lengths in use, and probes where none are.

The lengths themselves come from :mod:`slos_serve.planning.speculation`; here is what stays between two plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from slos_serve.core.plan import EngineView
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.acceptance import AcceptanceEstimate
from slos_serve.perf.batch_time import K_C, K_M, K_S, K_SEQ
from slos_serve.planning.prefill_rate import FloatArray, IntArray
from slos_serve.planning.settings import PlannerSettings
from slos_serve.planning.speculation import (
    HYSTERESIS_SHARE,
    LEAST_GAIN_SHARE,
    best_drafts,
    demand_by_length,
    fastest_draft,
    gather_tiers,
    rate_of,
    yields_of,
)

# A tier that drafts nothing learns nothing: this often one step drafts this many tokens for it.
PROBE_EVERY_S = 5.0
PROBE_TOKENS = 2
# Draft lengths of a tier that promises no TPOT are chosen as if it were this.
UNPROMISED_PACE_S = 0.1


def _no_floats() -> FloatArray:
    return np.empty(0)


def _no_ints() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Draft lengths by tier; empty arrays without speculation.

    Attributes:
        tpot_s: float64 [L], TPOT of each tier, ascending.
        tokens: int64 [L], draft length of each where there is prefill to do.
        alone_tokens: int64 [L], where there is none.
        yields: float64 [L], tokens that a verification of ``tokens`` drafts brings on average.
        longer: float64 [L], how many paces a batch that carries a decode of the tier is planned to last.
        draft_s: seconds of the draft model a batch.
    """

    tpot_s: FloatArray
    tokens: IntArray
    alone_tokens: IntArray
    yields: FloatArray
    longer: FloatArray
    draft_s: float


@njit(cache=True)
def with_drafts(
    pace_s: FloatArray,
    extra_s_each: FloatArray,
    tpot_margin: float,
    tpot_s: FloatArray,
    tokens: IntArray,
    yields: FloatArray,
    longer: FloatArray,
    draft_s_each: float,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What ``prefill_rate`` takes for tiers that draft: how many paces a period lasts, its tokens, its extra seconds.

    Args:
        pace_s: float64 [L'], TPOT of the tiers, ``tpot_margin`` taken off.
        extra_s_each: float64 [L'], seconds that one decode adds to a batch.
        tpot_margin: share of every TPOT kept in hand.
        tpot_s, tokens, yields, longer: of the :class:`DraftPlan`.
        draft_s_each: seconds beyond the roofline part that a draft to verify adds.
    """
    count = len(pace_s)
    paces, tokens_each, period_s_each = np.ones(count), np.ones(count), extra_s_each.copy()
    if len(tokens) == 0:
        return paces, tokens_each, period_s_each
    # Half the margin: paces may differ in their last digit from those that the lengths were chosen for.
    own_s = tpot_s * (1.0 - tpot_margin) * (1.0 - 1e-9)
    for j in range(count):
        level = max(int(np.searchsorted(own_s, pace_s[j], side="right")) - 1, 0)
        each = longer[level] / yields[level]  # verifications in a period
        paces[j] = longer[level]
        tokens_each[j] = each * (tokens[level] + 1.0)
        period_s_each[j] = each * (extra_s_each[j] + draft_s_each * tokens[level])
    return paces, tokens_each, period_s_each


@njit(cache=True)
def _remembered(
    now_s: float, tpot_s: FloatArray, seen_tpot_s: FloatArray, seen_tokens: IntArray, seen_drafted_s: FloatArray
) -> tuple[IntArray, FloatArray]:
    """Lengths in use and when each tier drafted last, for the tiers there are now; a new one drafts nothing yet."""
    tokens, drafted_s = np.zeros(len(tpot_s), dtype=np.int64), np.full(len(tpot_s), now_s)
    for level in range(len(tpot_s)):
        for before in range(len(seen_tpot_s)):
            if seen_tpot_s[before] == tpot_s[level]:
                tokens[level], drafted_s[level] = seen_tokens[before], seen_drafted_s[before]
    return tokens, drafted_s


@njit(cache=True)
def _worthwhile(
    counts: FloatArray,
    pace_s: FloatArray,
    extra_s: FloatArray,
    acceptance: FloatArray,
    coefficients: FloatArray,
    max_tokens: float,
    longest: int,
    longest_step_s: float,
    present: IntArray,
) -> IntArray:
    """The best lengths, where they add enough; none otherwise."""
    per_draft_s = coefficients[K_SEQ]
    periods, tokens, extra = demand_by_length(pace_s, extra_s, acceptance, longest, longest_step_s, per_draft_s)
    slope = max(coefficients[K_C], coefficients[K_M])
    hysteresis = HYSTERESIS_SHARE / slope
    drafts, rate, _ = best_drafts(counts, periods, tokens, extra, coefficients, max_tokens, present, hysteresis)
    # Those in use are kept a little longer, so that they do not come and go.
    least_gain = LEAST_GAIN_SHARE / slope - (hysteresis if present.any() else 0.0)
    none = np.zeros_like(drafts)
    if rate < rate_of(none, counts, periods, tokens, extra, coefficients, max_tokens) + least_gain:
        return none
    return drafts


@njit(cache=True)
def _chosen(
    rows: RequestArray,
    running: SlotArray,
    waiting: SlotArray,
    now_s: float,
    coefficients: FloatArray,
    lower: FloatArray,
    seen_tpot_s: FloatArray,
    seen_tokens: IntArray,
    seen_drafted_s: FloatArray,
    longest: int,
    adaptive: bool,
    learns: bool,
    tpot_margin: float,
    longest_step_s: float,
    max_tokens: float,
) -> tuple[FloatArray, IntArray, FloatArray, IntArray, IntArray, FloatArray, FloatArray, float]:
    """:meth:`Drafting.choose` as one kernel.

    Returns:
        what is remembered (TPOT of the tiers, their lengths, when each drafted last), and of the :class:`DraftPlan` all
        but the first.
    """
    tpot_s, counts, extra_s, acceptance = gather_tiers(rows, running, waiting, coefficients, lower)
    drafts, drafted_s = _remembered(now_s, tpot_s, seen_tpot_s, seen_tokens, seen_drafted_s)
    pace_s = np.where(np.isfinite(tpot_s), tpot_s, UNPROMISED_PACE_S) * (1.0 - tpot_margin)
    alone = longest
    if adaptive:
        drafts = _worthwhile(
            counts, pace_s, extra_s, acceptance, coefficients, max_tokens, longest, longest_step_s, drafts
        )
        alone = fastest_draft(counts, pace_s, extra_s, acceptance, coefficients, max_tokens, longest, longest_step_s)
    else:
        drafts[:] = longest
    tokens = drafts.copy()
    for level in range(len(tpot_s)):
        probe = learns and drafts[level] == 0 and now_s - drafted_s[level] >= PROBE_EVERY_S
        if probe:
            tokens[level] = min(PROBE_TOKENS, longest)
        if tokens[level] > 0:
            drafted_s[level] = now_s
    yields, longer = yields_of(tokens, acceptance, pace_s, longest_step_s)
    draft_s = float(coefficients[K_S] * tokens.max())
    alone_tokens = np.full(len(tpot_s), alone)
    return tpot_s, drafts, drafted_s, tokens, alone_tokens, yields, longer, draft_s


NO_DRAFTS = DraftPlan(_no_floats(), _no_ints(), _no_ints(), _no_floats(), _no_floats(), 0.0)


class Drafting:
    """Chooses draft lengths for one engine.

    Args:
        num_classes: SLO classes that requests may belong to.
        settings: the planner's.
    """

    def __init__(self, num_classes: int, settings: PlannerSettings) -> None:
        self.acceptance = AcceptanceEstimate(num_classes, settings.acceptance_confidence)
        self.present = NO_DRAFTS
        self._settings = settings
        self._known = None if settings.known_acceptance is None else np.full(num_classes, settings.known_acceptance)
        self._tpot_s = _no_floats()
        self._tokens = _no_ints()
        self._drafted_s = _no_floats()

    def choose(self, now_s: float, view: EngineView, coefficients: FloatArray) -> DraftPlan:
        """Lengths for the step that starts at ``now_s``; also kept as ``present``.

        Args:
            now_s: when the step starts.
            view: forecasts written, what is lost given up.
            coefficients: float64 [8], margin and correction applied.
        """
        settings = self._settings
        if settings.max_draft_tokens == 0:
            return NO_DRAFTS
        self._tpot_s, self._tokens, self._drafted_s, tokens, alone_tokens, yields, longer, draft_s = _chosen(
            view.table.rows,
            view.running,
            view.waiting,
            now_s,
            coefficients,
            self.acceptance.lower() if self._known is None else self._known,
            self._tpot_s,
            self._tokens,
            self._drafted_s,
            settings.max_draft_tokens,
            settings.adaptive_drafts,
            self._known is None,
            settings.tpot_margin,
            settings.longest_step_s,
            float(view.max_num_batched_tokens),
        )
        self.present = DraftPlan(self._tpot_s, tokens, alone_tokens, yields, longer, draft_s)
        return self.present
