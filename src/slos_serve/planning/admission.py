"""Admission of one view: who may be promised, and the sums it was judged by (design 4.2).

The planner acts on it; a replica that publishes its state to routers shows it. Nothing here changes a status.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from slos_serve.core.plan import EngineView
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.batch_time import K_SEQ
from slos_serve.planning.admission_kernel import GREEDY, INFEASIBLE, admit
from slos_serve.planning.candidates import forecast_lengths, gather
from slos_serve.planning.drafting import NO_DRAFTS, DraftPlan, with_drafts
from slos_serve.planning.freed_time import with_time_freed
from slos_serve.planning.greedy_set import admit_in_turn
from slos_serve.planning.lengths import EDGES, LengthForecast
from slos_serve.planning.memory import forecast, reserve
from slos_serve.planning.prefill_rate import BoolArray, FloatArray, IntArray, linear_step_s, linear_tokens, prefill_rate
from slos_serve.planning.settings import PlannerSettings

# With weights by length, a prompt of this length weighs what its class says.
UNIT_PROMPT_TOKENS = 1000.0
# Prefill that no engine has time for.
BEYOND = 1e15
Judged = tuple[
    SlotArray, BoolArray, bool, bool, int, FloatArray, FloatArray, IntArray, FloatArray, FloatArray, FloatArray,
    FloatArray, FloatArray, FloatArray, FloatArray, float, float, float,
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Admission:
    """What is admitted and what it was judged by; see :func:`slos_serve.planning.admission_kernel.admit`.

    Attributes:
        slots: int64 [n], requests with prefill left, in deadline order.
        taken: bool [n].
        infeasible: what is promised already does not fit any more (a forecast was wrong); nothing new is taken.
        stopped: the program made as many labels as it may and gave the best set it had found.
        labels: labels that the dynamic program kept.
        periods_s, tokens_each, period_s_each, draft_s, max_tokens: what ``prefill_rate`` was given, drafts counted in.
        start_s: when the fluid begins.
    """

    slots: SlotArray
    taken: BoolArray
    infeasible: bool
    stopped: bool
    labels: int
    due_s: FloatArray
    cost_tokens: FloatArray
    tier: IntArray
    memory: FloatArray
    memory_room: FloatArray
    counts: FloatArray
    pace_s: FloatArray
    periods_s: FloatArray
    tokens_each: FloatArray
    period_s_each: FloatArray
    draft_s: float
    max_tokens: float
    start_s: float


def write_forecasts(view: EngineView, settings: PlannerSettings, lengths: LengthForecast) -> None:
    """Write ``expected_tokens`` of everyone in the view, unless the table holds the truth."""
    if settings.oracle_lengths:
        return
    table = lengths.table()
    forecast_lengths(view.table.rows, view.running, table, EDGES)
    if len(view.waiting):
        forecast_lengths(view.table.rows, view.waiting, table, EDGES)


def judge(
    view: EngineView,
    now_s: float,
    coefficients: FloatArray,
    settings: PlannerSettings,
    lengths: LengthForecast,
    *,
    forecast_memory: bool,
    count_freed: bool = False,
    kept_blocks: int = 0,
    longest_step_s: float = math.inf,
    most_open_tokens: float = math.inf,
    drafts: DraftPlan = NO_DRAFTS,
) -> Admission:
    """Admission at ``now_s``; reads the view only.

    Args:
        view: forecasts written, what is lost given up.
        now_s: when the step starts.
        coefficients: float64 [8], margin and correction applied.
        settings: the planner's.
        lengths: what answers have been like.
        forecast_memory: forecast KV over time, or reserve the sum of peaks: one checkpoint, stricter.
        count_freed: add the time that running decodes leave, see :func:`with_time_freed`; without it, stricter.
        kept_blocks: KV blocks that promises leave to somebody else.
        longest_step_s: longest a step of prompts may take.
        most_open_tokens: whose prompt would make more than this, times its weight, together with those that are
            promised already is not admitted now.
        drafts: draft lengths of the tiers.
    """
    return Admission(
        *_judged(
            view.table.rows,
            view.running,
            view.waiting,
            now_s,
            coefficients,
            settings.tpot_margin,
            settings.max_implied_ttft_s,
            forecast_memory,
            count_freed,
            settings.dp_admission,
            settings.length_weight,
            settings.max_labels,
            view.total_blocks - kept_blocks,
            view.block_size,
            float(view.max_num_batched_tokens),
            longest_step_s,
            most_open_tokens,
            lengths.survival(),
            EDGES,
            drafts.tpot_s,
            drafts.tokens,
            drafts.yields,
            drafts.longer,
            drafts.draft_s,
        )
    )


@njit(cache=True)
def _judged(
    rows: RequestArray,
    running: SlotArray,
    waiting: SlotArray,
    now_s: float,
    coefficients: FloatArray,
    tpot_margin: float,
    max_implied_ttft_s: float,
    forecast_memory: bool,
    count_freed: bool,
    dp_admission: bool,
    length_weight: float,
    max_labels: int,
    total_blocks: int,
    block_size: int,
    max_tokens: float,
    longest_step_s: float,
    most_open_tokens: float,
    survival: FloatArray,
    edges: FloatArray,
    tier_tpot_s: FloatArray,
    tier_tokens: IntArray,
    tier_yields: FloatArray,
    tier_longer: FloatArray,
    draft_s: float,
) -> Judged:
    """:func:`judge` as one kernel: its parts take a few microseconds each, calling them one by one took as long."""
    slots, due_s, cost, tier, must, counts, pace_s, extra_s, own_periods_s = gather(
        rows, running, waiting, now_s, coefficients, tpot_margin, max_implied_ttft_s
    )
    is_must = must > 0.0
    if forecast_memory:
        memory, room = forecast(
            rows, running, slots, due_s, now_s, pace_s[0], survival, edges, total_blocks, block_size
        )  # fmt: skip
    else:
        memory, room = reserve(rows, running, slots, total_blocks, block_size)
    paces, tokens_each, period_s_each = with_drafts(
        pace_s, extra_s, tpot_margin, tier_tpot_s, tier_tokens, tier_yields, tier_longer, coefficients[K_SEQ]
    )
    # What drafts make of the pace holds for those who have their lead as well.
    periods_s = np.empty(len(pace_s))
    for j in range(len(pace_s)):
        periods_s[j] = paces[j] * own_periods_s[j]
    drafting = bool(tier_tokens.any())
    start_s = now_s + cut_short_s(coefficients, drafting)
    if longest_step_s < np.inf:
        max_tokens = linear_tokens(coefficients, longest_step_s, max_tokens)
    fluid_due_s = due_s
    if count_freed and not drafting:
        rate = prefill_rate(counts, periods_s, tokens_each, period_s_each, draft_s, coefficients, max_tokens)
        fluid_due_s = with_time_freed(
            rows, running, due_s, start_s, periods_s, tokens_each, period_s_each, max_tokens, rate, coefficients,
            tpot_margin, survival, edges,
        )  # fmt: skip
    weight = np.empty(len(slots))
    for j in range(len(slots)):
        by_length = (rows["prompt_tokens"][slots[j]] / UNIT_PROMPT_TOKENS) ** length_weight
        weight[j] = rows["weight"][slots[j]] * by_length
    asked = _within(cost, weight, is_must, most_open_tokens)
    if dp_admission:
        taken, _, _, status, labels = admit(
            fluid_due_s, asked, tier, memory, weight, is_must, counts, periods_s, tokens_each, period_s_each, draft_s,
            coefficients, max_tokens, start_s, room, max_labels,
        )  # fmt: skip
    else:
        turn = np.argsort(rows["order"][slots])
        taken = admit_in_turn(
            turn, fluid_due_s, asked, tier, memory, is_must, counts, periods_s, tokens_each, period_s_each, draft_s,
            coefficients, max_tokens, start_s, room,
        )  # fmt: skip
        status, labels = GREEDY, 0
    infeasible = status == INFEASIBLE
    return (
        slots, is_must if infeasible else taken, infeasible, status == GREEDY, labels, due_s, cost, tier, memory, room,
        counts, pace_s, periods_s, tokens_each, period_s_each, draft_s, max_tokens, start_s,
    )  # fmt: skip


@njit(cache=True)
def _within(cost: FloatArray, weight: FloatArray, is_must: BoolArray, most_open_tokens: float) -> FloatArray:
    """Costs as admission sees them: more than there is time for where a prompt would make too much open at once."""
    asked = cost
    if most_open_tokens < np.inf:
        promised = cost[is_must].sum()
        within = promised + cost <= most_open_tokens * np.maximum(weight, 1.0)
        asked = np.where(is_must | within, cost, BEYOND)
    return asked


@njit(cache=True)
def cut_short_s(coefficients: FloatArray, drafting: bool = False) -> float:
    """Seconds by which admission's fluid starts late.

    The batch that ends a prompt is cut short by its due time: one more fixed cost than a fluid has. Three times
    that beside drafts, whose verifications bring fewer tokens than their mean now and then.
    """
    return float(linear_step_s(coefficients, 0.0)) * (3.0 if drafting else 1.0)
