"""Draft lengths from plan to plan, and what the decodes of one step draft.

Lengths are chosen by :mod:`slos_serve.planning.speculation`. Between two plans stay the lengths in use and when each
tier drafted last: a tier that drafts nothing learns nothing, so it drafts a little now and then.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.acceptance import AcceptanceEstimate
from slos_serve.perf.formula import K_SEQ
from slos_serve.perf.step_time import batch_s, decode_s, per_token_s
from slos_serve.planning.speculation import (
    HYSTERESIS_SHARE,
    LEAST_GAIN_SHARE,
    best_drafts,
    demand_by_length,
    fastest_draft,
    rate_of,
    yields_of,
)
from slos_serve.planning.state import BEST_EFFORT, FloatArray, IntArray, State, is_decode
from slos_serve.planning.supply import tier_of, tier_paces

# A tier that drafts nothing drafts this many tokens in one step this often.
PROBE_EVERY_S, PROBE_TOKENS = 5.0, 2
# Draft lengths of a tier that promises no TPOT are chosen as if it were this.
UNPROMISED_PACE_S = 0.1
# A verification may bring one token only. Decodes that draft are kept this many batches ahead of their due times, so
# that a few such in a row neither make them late nor cut batches short.
LEAD_PERIODS = 4.0


class DraftPlan(NamedTuple):
    """Draft lengths by tier; empty arrays without speculation.

    Attributes:
        tpot_s: float64 [L], TPOT of each tier, ascending.
        tokens: int64 [L], draft length of each where there is prefill to do.
        alone_tokens: int64 [L], where there is none.
        yields: float64 [L], tokens that a verification of ``tokens`` drafts brings on average.
        longer: float64 [L], how many paces a batch that carries a decode of the tier is planned to last.
    """

    tpot_s: FloatArray
    tokens: IntArray
    alone_tokens: IntArray
    yields: FloatArray
    longer: FloatArray


class Remembered(NamedTuple):
    """What one plan leaves to the next: TPOT of the tiers, draft length of each, when each drafted last."""

    tpot_s: FloatArray
    tokens: IntArray
    drafted_s: FloatArray


class Tiers(NamedTuple):
    """Decode tiers as the choice of lengths sees them; float64 [L] each.

    Attributes:
        tpot_s, pace_s: TPOT, and the pace planned with.
        counts: decodes that run, 1 where only prompts ask.
        extra_s: seconds beside the roofline part that one decode adds to a batch.
        acceptance: mean acceptance of its requests.
    """

    tpot_s: FloatArray
    pace_s: FloatArray
    counts: FloatArray
    extra_s: FloatArray
    acceptance: FloatArray


class StepDrafts(NamedTuple):
    """What the promised decodes draft in one step.

    Attributes:
        lengths: int64 [decodes].
        longest_s: how long a step beside them may last; inf without drafts.
        ahead_s: decodes due within this time after the step's end are in it.
    """

    lengths: IntArray
    longest_s: float
    ahead_s: float


NO_DRAFTS = DraftPlan(np.empty(0), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0), np.empty(0))
NOTHING = Remembered(np.empty(0), np.empty(0, dtype=np.int64), np.empty(0))


@njit(cache=True)
def draft_tiers(state: State, asking: SlotArray, acceptance: FloatArray) -> Tiers:
    """Tiers of the requests that may be promised; best effort makes up the only one where nobody may be."""
    tpot_s = tier_paces(state, asking)
    count = len(tpot_s)
    decodes, context, accepted, in_tier = np.zeros(count), np.zeros(count), np.zeros(count), np.zeros(count)
    rows = state.rows
    for with_best_effort in (False, True):
        if with_best_effort and in_tier.sum() > 0.0:
            break
        for part in (state.running, asking):
            for slot in part:
                if state.status[slot] == BEST_EFFORT and not with_best_effort:
                    continue
                tier = tier_of(tpot_s, rows["tpot_s"][slot])
                in_tier[tier] += 1.0
                accepted[tier] += acceptance[rows["class_index"][slot]]
                grown = 0.5 * (rows["output_tokens"][slot] + rows["expected_tokens"][slot])
                context[tier] += rows["prompt_tokens"][slot] + grown
                decodes[tier] += 1.0 if is_decode(rows, slot) else 0.0
    in_tier = np.maximum(in_tier, 1.0)
    extra_s = np.empty(count)
    for tier in range(count):
        extra_s[tier] = decode_s(state.coefficients, 0.0, context[tier] / in_tier[tier])
    pace_s = np.where(np.isfinite(tpot_s), tpot_s, UNPROMISED_PACE_S) * (1.0 - state.margin)
    return Tiers(tpot_s, pace_s, np.maximum(decodes, 1.0), extra_s, accepted / in_tier)


@njit(cache=True)
def worthwhile(state: State, tiers: Tiers, longest: int, longest_step_s: float, present: IntArray) -> IntArray:
    """The best lengths where they add enough prefill; none otherwise. Lengths in use are kept a little longer."""
    coefficients, most = state.coefficients, float(state.max_tokens)
    tables = demand_by_length(
        tiers.pace_s, tiers.extra_s, tiers.acceptance, longest, longest_step_s, coefficients[K_SEQ]
    )
    hysteresis = HYSTERESIS_SHARE / per_token_s(coefficients)
    drafts, rate, _ = best_drafts(tiers.counts, *tables, coefficients, most, present, hysteresis)
    least_gain = LEAST_GAIN_SHARE / per_token_s(coefficients) - (hysteresis if present.any() else 0.0)
    none = np.zeros_like(drafts)
    if rate < rate_of(none, tiers.counts, *tables, coefficients, most) + least_gain:
        return none
    return drafts


@njit(cache=True)
def choose_lengths(
    state: State, tiers: Tiers, seen: Remembered, longest: int, longest_step_s: float
) -> tuple[Remembered, DraftPlan]:
    """Lengths for the step that is planned; a tier not seen before drafts nothing yet."""
    count = len(tiers.tpot_s)
    present, drafted_s = np.zeros(count, dtype=np.int64), np.full(count, state.now_s)
    for tier in range(count):
        for before in range(len(seen.tpot_s)):
            if seen.tpot_s[before] == tiers.tpot_s[tier]:
                present[tier], drafted_s[tier] = seen.tokens[before], seen.drafted_s[before]
    drafts = worthwhile(state, tiers, longest, longest_step_s, present)
    alone = fastest_draft(
        tiers.counts,
        tiers.pace_s,
        tiers.extra_s,
        tiers.acceptance,
        state.coefficients,
        float(state.max_tokens),
        longest,
        longest_step_s,
    )
    tokens = drafts.copy()
    for tier in range(count):
        if drafts[tier] == 0 and state.now_s - drafted_s[tier] >= PROBE_EVERY_S:
            tokens[tier] = min(PROBE_TOKENS, longest)
        if tokens[tier] > 0:
            drafted_s[tier] = state.now_s
    yields, longer = yields_of(tokens, tiers.acceptance, tiers.pace_s, longest_step_s)
    plan = DraftPlan(tiers.tpot_s, tokens, np.full(count, alone), yields, longer)
    return Remembered(tiers.tpot_s, drafts, drafted_s), plan


@njit(cache=True)
def draft_of(rows: RequestArray, slot: int, tpot_s: FloatArray, lengths: IntArray) -> int:
    """Draft length of a decode: its tier's, as far as it has drafts and may still generate tokens."""
    if len(lengths) == 0:
        return 0
    left = min(rows["max_tokens"][slot] - rows["output_tokens"][slot] - 1, rows["draft_limit"][slot])
    return int(max(min(lengths[tier_of(tpot_s, rows["tpot_s"][slot])], left), 0))


@njit(cache=True)
def step_drafts(state: State, decodes: SlotArray, pace_s: float, plan: DraftPlan, lengths: IntArray) -> StepDrafts:
    """What ``decodes`` draft; when none drafts anything the step is as without speculation."""
    found, longest_s = np.zeros(len(decodes), dtype=np.int64), np.inf
    for j in range(len(decodes)):
        if len(lengths) > 0:
            found[j] = draft_of(state.rows, decodes[j], plan.tpot_s, lengths)
            own_s = state.rows["tpot_s"][decodes[j]] * (1.0 - state.margin)
            longest_s = min(longest_s, own_s * plan.longer[tier_of(plan.tpot_s, state.rows["tpot_s"][decodes[j]])])
    if not found.any():
        return StepDrafts(found, np.inf, pace_s)
    return StepDrafts(found, longest_s, LEAD_PERIODS * longest_s)


@njit(cache=True)
def cap_drafts(state: State, decodes: SlotArray, lengths: IntArray, limit_s: float) -> None:
    """Shorten the drafts of ``decodes`` to the longest with which they end within ``limit_s``; 0 at least."""
    cap = lengths.max() if len(lengths) else 0
    while cap > 0:
        tokens, own_s = 0.0, 0.0
        for j in range(len(decodes)):
            draft = min(lengths[j], cap)
            tokens += 1.0 + draft
            own_s += decode_s(state.coefficients, draft, state.rows["computed_tokens"][decodes[j]])
        if tokens <= state.max_tokens and batch_s(state.coefficients, tokens, own_s, cap) <= limit_s:
            break
        cap -= 1
    lengths[:] = np.minimum(lengths, cap)


@njit(cache=True)
def with_drafts(
    pace_s: FloatArray, periods_s: FloatArray, extra_s_each: FloatArray, plan: DraftPlan, draft_s_each: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Periods, tokens and extra seconds a period of decodes that draft; float64 [L] each, see :class:`Supply`."""
    count = len(pace_s)
    periods, tokens_each, extra_s = periods_s.copy(), np.ones(count), extra_s_each.copy()
    if len(plan.tokens) == 0:
        return periods, tokens_each, extra_s
    for j in range(count):
        tier = tier_of(plan.tpot_s, pace_s[j])
        each = plan.longer[tier] / plan.yields[tier]  # verifications in a period
        periods[j] = plan.longer[tier] * periods_s[j]
        tokens_each[j] = each * (plan.tokens[tier] + 1.0)
        extra_s[j] = each * (extra_s_each[j] + draft_s_each * plan.tokens[tier])
    return periods, tokens_each, extra_s


class Drafting:
    """Draft lengths of one engine.

    Args:
        num_classes: SLO classes that requests may belong to.
        longest: longest draft; 0 for no speculation.
        confidence: see :class:`slos_serve.perf.acceptance.AcceptanceEstimate`.

    Attributes:
        acceptance: learnt from verifications.
        present: lengths of the newest plan.
    """

    def __init__(self, num_classes: int, longest: int, confidence: float) -> None:
        self.acceptance = AcceptanceEstimate(num_classes, confidence)
        self.present = NO_DRAFTS
        self._longest = longest
        self._seen = NOTHING

    def choose(self, state: State, asking: SlotArray, longest_step_s: float) -> tuple[Remembered, DraftPlan]:
        """Lengths for the step that is planned, and what :meth:`keep` takes when it ran."""
        if self._longest == 0:
            return NOTHING, NO_DRAFTS
        tiers = draft_tiers(state, asking, self.acceptance.lower())
        return choose_lengths(state, tiers, self._seen, self._longest, longest_step_s)

    def keep(self, seen: Remembered, plan: DraftPlan) -> None:
        """The plan made with these lengths ran."""
        self._seen, self.present = seen, plan
