"""Draft lengths from plan to plan: what is known of acceptance, the lengths in use, and probes where none are.

The lengths themselves come from :mod:`slos_serve.planning.speculation`; here is what stays between two plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from slos_serve.core.plan import EngineView
from slos_serve.perf.acceptance import AcceptanceEstimate
from slos_serve.perf.batch_time import K_C, K_M, K_S
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
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What ``prefill_rate`` takes for tiers that draft: how many paces a period lasts, its tokens, its extra seconds.

    Args:
        pace_s: float64 [L'], TPOT of the tiers, ``tpot_margin`` taken off.
        extra_s_each: float64 [L'], seconds that one decode adds to a batch.
        tpot_margin: share of every TPOT kept in hand.
        tpot_s, tokens, yields, longer: of the :class:`DraftPlan`.
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
        period_s_each[j] = each * extra_s_each[j]
    return paces, tokens_each, period_s_each


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
        longest = settings.max_draft_tokens
        if longest == 0:
            return NO_DRAFTS
        lower = self.acceptance.lower() if self._known is None else self._known
        tpot_s, counts, extra_s, acceptance = gather_tiers(
            view.table.rows, view.running, view.waiting, coefficients, lower
        )
        pace_s = np.where(np.isfinite(tpot_s), tpot_s, UNPROMISED_PACE_S) * (1.0 - settings.tpot_margin)
        max_tokens = float(view.max_num_batched_tokens)
        self._follow(now_s, tpot_s)
        if settings.adaptive_drafts:
            periods, tokens, extra = demand_by_length(pace_s, extra_s, acceptance, longest, settings.longest_step_s)
            slope = max(coefficients[K_C], coefficients[K_M])
            hysteresis = HYSTERESIS_SHARE / slope
            drafts, rate, _ = best_drafts(
                counts, periods, tokens, extra, coefficients, max_tokens, self._tokens, hysteresis
            )
            # Those in use are kept a little longer, so that they do not come and go.
            least_gain = LEAST_GAIN_SHARE / slope - (hysteresis if self._tokens.any() else 0.0)
            none = np.zeros_like(drafts)
            if rate < rate_of(none, counts, periods, tokens, extra, coefficients, max_tokens) + least_gain:
                drafts = none
            alone = fastest_draft(counts, pace_s, extra_s, acceptance, coefficients, max_tokens, longest)
            alone_tokens = np.full(len(tpot_s), alone)
        else:
            drafts = alone_tokens = np.full(len(tpot_s), longest)
        self._tokens = drafts
        self._drafted_s[drafts > 0] = now_s
        self.present = self._plan_of(
            tpot_s, pace_s, self._probed(now_s, drafts), alone_tokens, acceptance, coefficients
        )
        return self.present

    def _follow(self, now_s: float, tpot_s: FloatArray) -> None:
        """Take what is remembered over to the tiers there are now: a new one drafts nothing yet."""
        if np.array_equal(self._tpot_s, tpot_s):
            return
        tokens, drafted_s = np.zeros(len(tpot_s), dtype=np.int64), np.full(len(tpot_s), now_s)
        for level, tpot in enumerate(tpot_s):
            same = np.flatnonzero(self._tpot_s == tpot)
            if len(same):
                tokens[level], drafted_s[level] = self._tokens[same[0]], self._drafted_s[same[0]]
        self._tpot_s, self._tokens, self._drafted_s = tpot_s, tokens, drafted_s

    def _probed(self, now_s: float, drafts: IntArray) -> IntArray:
        """The lengths, with a probe for tiers that have drafted nothing for long."""
        if self._known is not None or not self._settings.adaptive_drafts or drafts.all():
            return drafts
        stale = (drafts == 0) & (now_s - self._drafted_s >= PROBE_EVERY_S)
        self._drafted_s[stale] = now_s
        return np.where(stale, min(PROBE_TOKENS, self._settings.max_draft_tokens), drafts)

    def _plan_of(
        self,
        tpot_s: FloatArray,
        pace_s: FloatArray,
        drafts: IntArray,
        alone_tokens: IntArray,
        acceptance: FloatArray,
        coefficients: FloatArray,
    ) -> DraftPlan:
        yields, longer = yields_of(drafts, acceptance, pace_s, self._settings.longest_step_s)
        draft_s = float(coefficients[K_S] * drafts.max())
        return DraftPlan(tpot_s, drafts, alone_tokens, yields, longer, draft_s)
