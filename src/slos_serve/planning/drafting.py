"""Draft lengths from plan to plan, and what the decodes of one step draft.

Lengths are chosen by :mod:`slos_serve.planning.speculation`. Between two plans stay the lengths in use and when each
tier drafted last: a tier that drafts nothing learns nothing, so it drafts a little now and then.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.formula import K_SEQ
from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import batch_s, decode_s, per_token_s
from slos_serve.planning.speculation import (
    HYSTERESIS_SHARE,
    best_drafts,
    fastest_draft,
    paces_in_a_batch,
    rate_of,
    table_of_lengths,
    tokens_each_verification,
)
from slos_serve.planning.state import FloatArray, IntArray, State
from slos_serve.planning.tiers import Tiers, tier_of

# Drafts are made where they add this share of the prefill rate of an engine without decodes. Rates are reckoned with
# the mean of what verifications bring; most of those with few right drafts bring one token and cut batches short, and a
# gain as small as that is not seen.
LEAST_GAIN_SHARE = 0.08
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
        chosen: int64 [L], ``tokens`` without the drafts of a probe.
        drafted_s: float64 [L], when each tier drafted last.
    """

    tpot_s: FloatArray
    tokens: IntArray
    alone_tokens: IntArray
    yields: FloatArray
    longer: FloatArray
    chosen: IntArray
    drafted_s: FloatArray


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


@njit(cache=True)
def no_drafts() -> DraftPlan:
    """The plan without speculation."""
    none, zero = np.empty(0), np.empty(0, dtype=np.int64)
    return DraftPlan(none, zero, zero, none, none, zero, none)


@njit(cache=True)
def plan_drafts(state: State, tiers: Tiers, last: DraftPlan, longest: int, longest_step_s: float) -> DraftPlan:
    """Lengths for the step that is planned; a tier not seen before drafts nothing yet.

    Args:
        last: the plan before.
        longest: longest draft; 0 for no speculation.
    """
    if longest == 0:
        return no_drafts()
    count = len(tiers.tpot_s)
    present, drafted_s = np.zeros(count, dtype=np.int64), np.full(count, state.now_s)
    for tier in range(count):
        for before in range(len(last.tpot_s)):
            if last.tpot_s[before] == tiers.tpot_s[tier]:
                present[tier], drafted_s[tier] = last.chosen[before], last.drafted_s[before]
    pace_s = np.where(np.isfinite(tiers.tpot_s), tiers.tpot_s, UNPROMISED_PACE_S) * (1.0 - state.margin)
    chosen = worthwhile(state, pace_s, tiers, longest, longest_step_s, present)
    alone = fastest_draft(pace_s, tiers, state.coefficients, float(state.max_tokens), longest, longest_step_s)
    tokens, yields, longer = chosen.copy(), np.empty(count), np.empty(count)
    for tier in range(count):
        if chosen[tier] == 0 and state.now_s - drafted_s[tier] >= PROBE_EVERY_S:
            tokens[tier] = min(PROBE_TOKENS, longest)
        if tokens[tier] > 0:
            drafted_s[tier] = state.now_s
        yields[tier] = tokens_each_verification(tiers.acceptance[tier], tokens[tier])
        longer[tier] = paces_in_a_batch(yields[tier], pace_s[tier], longest_step_s)
    return DraftPlan(tiers.tpot_s, tokens, np.full(count, alone), yields, longer, chosen, drafted_s)


@njit(cache=True)
def worthwhile(
    state: State, pace_s: FloatArray, tiers: Tiers, longest: int, longest_step_s: float, present: IntArray
) -> IntArray:
    """The best lengths where they add enough prefill; none otherwise. Lengths in use are kept a little longer."""
    coefficients, most, counts = state.coefficients, float(state.max_tokens), np.maximum(tiers.decodes, 1.0)
    table = table_of_lengths(pace_s, tiers, longest, longest_step_s, coefficients[K_SEQ])
    hysteresis = HYSTERESIS_SHARE / per_token_s(coefficients)
    drafts, rate, _ = best_drafts(counts, table, coefficients, most, present, hysteresis)
    least_gain = LEAST_GAIN_SHARE / per_token_s(coefficients) - (hysteresis if present.any() else 0.0)
    none = np.zeros_like(drafts)
    return none if rate < rate_of(none, counts, table, coefficients, most) + least_gain else drafts


@in_place
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
    tiers: Tiers, periods_s: FloatArray, plan: DraftPlan, draft_s_each: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Periods, tokens and extra seconds a period of decodes that draft; float64 [L] each, see :class:`Supply`."""
    count = len(periods_s)
    periods, tokens_each, extra_s = periods_s.copy(), np.ones(count), tiers.extra_s.copy()
    if len(plan.tokens) == 0:
        return periods, tokens_each, extra_s
    for j in range(count):
        tier = tier_of(plan.tpot_s, tiers.tpot_s[j])
        each = plan.longer[tier] / plan.yields[tier]  # verifications in a period
        periods[j] *= plan.longer[tier]
        tokens_each[j] = each * (plan.tokens[tier] + 1.0)
        extra_s[j] = each * (extra_s[j] + draft_s_each * plan.tokens[tier])
    return periods, tokens_each, extra_s
