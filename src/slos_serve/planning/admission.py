"""Admission of one state: from who asks and what is left to who is taken.

The planner acts on it, a replica that publishes its state to routers shows it. Nothing here changes a status.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import njit

from slos_serve.core.request import SlotArray
from slos_serve.perf.formula import K_S, K_SEQ
from slos_serve.perf.step_time import roofline_s, roofline_tokens
from slos_serve.planning.algorithm1 import MOST_WORK, Admitted, admit
from slos_serve.planning.demand import Demand, build_demand
from slos_serve.planning.drafting import DraftPlan, with_drafts
from slos_serve.planning.memory import forecast, peaks
from slos_serve.planning.settings import PlannerSettings
from slos_serve.planning.state import FloatArray, State
from slos_serve.planning.supply import (
    MOMENT_TOKENS,
    Supply,
    decodes_by_tier,
    kv_shortage,
    lend,
    pace_of_moments_s,
    tier_paces,
)

# Fixed costs by which prefill begins late. Admission counts a fluid, steps are whole: the batch that ends a prompt is
# cut short by its due time, and the one before it may be. Beside drafts, a step may bring fewer tokens than the mean.
CUT_SHORT, CUT_SHORT_WITH_DRAFTS = 1.5, 3.0
# Times that cheaper requests to come are charged for: they come in bursts.
TO_COME = 2.0


class Expected(NamedTuple):
    """What the planner expects of the near future.

    Attributes:
        longest_s: longest a step of prompts may take, for the sake of those that arrive meanwhile.
        load: float64 [2, SIZES], see :class:`slos_serve.planning.arrivals.Arrivals`.
        survival: float64 [classes, bins + 1], see :meth:`slos_serve.planning.lengths.LengthForecast.survival`.
    """

    longest_s: float
    load: FloatArray
    survival: FloatArray


class Asked(NamedTuple):
    """A question put to Algorithm 1 and its answer.

    Attributes:
        paces_s: float64 [L], TPOT of each tier.
        in_tier: float64 [L], requests that a tier's cost is the mean of.
    """

    demand: Demand
    supply: Supply
    admitted: Admitted
    paces_s: FloatArray
    in_tier: FloatArray


@njit(cache=True)
def build_supply(
    state: State, asking: SlotArray, paces_s: FloatArray, longest_s: float, drafts: DraftPlan
) -> tuple[Supply, FloatArray]:
    """What is left for prompts beside the decodes that run, before memory and what decodes lend; and ``in_tier``."""
    coefficients = state.coefficients
    counts, own_periods_s, own_extra_s, in_tier = decodes_by_tier(state, asking, paces_s)
    periods_s, tokens_each, extra_s = with_drafts(paces_s, own_periods_s, own_extra_s, drafts, coefficients[K_SEQ])
    drafting = drafts.tokens.any()
    draft_s = float(coefficients[K_S] * drafts.tokens.max()) if drafting else 0.0
    late_s = roofline_s(coefficients, 0.0) * (CUT_SHORT_WITH_DRAFTS if drafting else CUT_SHORT)
    start_s, max_tokens = state.now_s + late_s, float(state.max_tokens)
    if longest_s < float("inf"):
        max_tokens = roofline_tokens(coefficients, longest_s, max_tokens)
    moments_s = start_s + MOMENT_TOKENS * pace_of_moments_s(state, paces_s)
    none = 0.0 * moments_s
    supply = Supply(
        coefficients, max_tokens, draft_s, start_s, counts, periods_s, tokens_each, extra_s, none[:1], moments_s, none
    )
    return supply, in_tier


def admission_of(
    state: State,
    asking: SlotArray,
    settings: PlannerSettings,
    expected: Expected,
    drafts: DraftPlan,
    total_blocks: int,
    by_peaks: bool,
) -> Asked:
    """Build demand and supply of a state and ask Algorithm 1.

    Args:
        asking: waiting slots, see :func:`slos_serve.planning.demand.most_urgent`.
        total_blocks: KV blocks less what is kept for others.
        by_peaks: count every request at its forecast peak.
    """
    paces_s, survival = tier_paces(state, asking), expected.survival
    load = expected.load * TO_COME * (1.0 + kv_shortage(state))  # where KV is short, prompts take that of the next too
    demand = build_demand(state, asking, paces_s, settings.max_implied_ttft_s, settings.length_weight, load)
    supply, in_tier = build_supply(state, asking, paces_s, expected.longest_s, drafts)
    if by_peaks:
        blocks, room = peaks(state, demand, total_blocks)
    else:
        pace_s = pace_of_moments_s(state, paces_s)
        blocks, room = forecast(state, demand, pace_s, survival, total_blocks)
    demand, supply = demand._replace(blocks=blocks), supply._replace(blocks=room)
    if len(demand.slots) and not drafts.tokens.any():
        supply = supply._replace(lent_tokens=lend(state, supply, paces_s, survival, float(demand.due_s[0])))
    return Asked(demand, supply, admit(demand, supply, MOST_WORK), paces_s, in_tier)
