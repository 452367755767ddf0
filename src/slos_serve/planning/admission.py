"""Admission of one state: from who asks and what is left to who is taken.

The planner acts on it, a replica that publishes its state to routers shows it. Nothing here changes a status.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import SlotArray
from slos_serve.perf.formula import K_S, K_SEQ
from slos_serve.perf.step_time import roofline_s, roofline_tokens
from slos_serve.planning.algorithm1 import MOST_WORK, Admitted, admit
from slos_serve.planning.demand import Demand, build_demand
from slos_serve.planning.drafting import DraftPlan, with_drafts
from slos_serve.planning.memory import forecast
from slos_serve.planning.seats import seats_by
from slos_serve.planning.state import FloatArray, State
from slos_serve.planning.supply import MOMENT_TOKENS, Supply, kv_shortage, lend, pace_of_moments_s
from slos_serve.planning.tiers import Tiers

# Fixed costs by which prefill begins late. Admission counts a fluid, steps are whole: the batch that ends a prompt is
# cut short by its due time, and the one before it may be. Beside drafts, a step may bring fewer tokens than the mean.
CUT_SHORT, CUT_SHORT_WITH_DRAFTS = 1.5, 3.0
# Times that cheaper requests to come are charged for: they come in bursts.
TO_COME = 2.0


class Question(NamedTuple):
    """What admission is asked with, beside the state.

    Attributes:
        tiers: decode tiers, drafts of each.
        longest_s: longest a step of prompts may take, for the sake of those that arrive meanwhile.
        load: float64 [2, SIZES], see :class:`slos_serve.planning.arrivals.Arrivals`.
        survival: float64 [classes, bins + 1], see :meth:`slos_serve.perf.lengths.LengthForecast.survival`.
        total_blocks: KV blocks less what is kept for others.
        max_implied_ttft_s, length_weight: see :class:`slos_serve.planning.settings.PlannerSettings`.
    """

    tiers: Tiers
    drafts: DraftPlan
    longest_s: float
    load: FloatArray
    survival: FloatArray
    total_blocks: int
    max_implied_ttft_s: float
    length_weight: float


class Asked(NamedTuple):
    """A question put to Algorithm 1 and its answer; ``to_come`` (float64 [2, SIZES]) is what open requests were
    charged for, see :func:`slos_serve.planning.demand.build_demand`."""

    demand: Demand
    supply: Supply
    admitted: Admitted
    tiers: Tiers
    to_come: FloatArray


@njit(cache=True)
def build_supply(state: State, question: Question, blocks: FloatArray, seats: FloatArray) -> Supply:
    """What is left for prompts beside the decodes that run, before what these lend.

    Args:
        blocks: float64 [K], KV blocks left.
        seats: float64 [M], see :func:`slos_serve.planning.seats.seats_by`.
    """
    coefficients, tiers, drafts = state.coefficients, question.tiers, question.drafts
    paces_s = tiers.tpot_s * (1.0 - state.margin * (1.0 - tiers.ahead))
    periods_s, tokens_each, extra_s = with_drafts(tiers, paces_s, drafts, coefficients[K_SEQ])
    drafting = drafts.tokens.any()
    draft_s = float(coefficients[K_S] * drafts.tokens.max()) if drafting else 0.0
    late_s = roofline_s(coefficients, 0.0) * (CUT_SHORT_WITH_DRAFTS if drafting else CUT_SHORT)
    start_s, max_tokens = state.now_s + late_s, float(state.max_tokens)
    if question.longest_s < np.inf:
        max_tokens = roofline_tokens(coefficients, question.longest_s, max_tokens)
    moments_s = start_s + MOMENT_TOKENS * pace_of_moments_s(state, tiers.tpot_s)
    return Supply(
        coefficients,
        max_tokens,
        draft_s,
        start_s,
        tiers.counts,
        periods_s,
        tokens_each,
        extra_s,
        blocks,
        moments_s,
        np.zeros(len(moments_s)),
        seats,
    )


@njit(cache=True)
def admission_of(state: State, asking: SlotArray, question: Question) -> Asked:
    """Build demand and supply of a state and ask Algorithm 1.

    Args:
        asking: waiting slots, see :func:`slos_serve.planning.demand.most_urgent`.
    """
    tpot_s, survival, total = question.tiers.tpot_s, question.survival, question.total_blocks
    load = question.load * (TO_COME * (1.0 + kv_shortage(state)))  # where KV is short, prompts take the next one's too
    asked = build_demand(state, asking, tpot_s, question.max_implied_ttft_s, question.length_weight, load)
    pace_s = pace_of_moments_s(state, tpot_s)
    blocks, room, taken = forecast(state, asked, pace_s, survival, total)
    demand = Demand(
        asked.slots,
        asked.due_s,
        asked.tokens,
        asked.tier,
        blocks,
        asked.weight,
        asked.promised,
        asked.needs_seat,
    )
    supply = build_supply(state, question, room, seats_by(state, asked, pace_s, taken))
    if not question.drafts.tokens.any():
        # Nobody asks in a plan, but in what is published for those to come.
        first_due_s = demand.due_s[0] if len(demand.slots) > 0 else supply.start_s
        supply.lent_tokens[:] = lend(state, supply, tpot_s, survival, first_due_s)
    admitted = admit(demand, supply, MOST_WORK)
    return Asked(demand, supply, admitted, question.tiers, load)
