"""One plan as one kernel: from an engine's state to the step, and what the next plan has to know.

    state -> who is lost, who asks -> tiers, arrivals, turn, drafts -> admission -> step

Engines call this before every step; one compiled call costs a fraction of a dozen. It writes length forecasts, and the
paces of deadlines that follow from them, into the request table and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import SlotArray
from slos_serve.perf.lengths import forecast_lengths
from slos_serve.planning.admission import Asked, Question, admission_of
from slos_serve.planning.arrivals import Arrivals, count_arrivals, longest_step_s
from slos_serve.planning.best_effort import NOBODY, Turn, count_begun, in_fair_order, next_turn, shares_now
from slos_serve.planning.deadlines import pace_answers
from slos_serve.planning.demand import give_up_lost, most_urgent
from slos_serve.planning.drafting import DraftPlan, plan_drafts
from slos_serve.planning.form import PREFILL_DEADLINE, form_step
from slos_serve.planning.state import (
    ADMITTED,
    BEST_EFFORT,
    UNDECIDED,
    BoolArray,
    FloatArray,
    IntArray,
    State,
    peak_blocks,
)
from slos_serve.planning.step import ENTRIES, HELD, PREEMPTED, Step, seconds
from slos_serve.planning.tiers import Tiers, tiers_of
from slos_serve.planning.work import Rules


class Known(NamedTuple):
    """What is learnt and set.

    Attributes:
        lengths: float64 [classes, bins], see :meth:`slos_serve.perf.lengths.LengthForecast.table`.
        survival: float64 [classes, bins + 1], see :meth:`slos_serve.perf.lengths.LengthForecast.survival`.
        acceptance: float64 [classes], of drafts, as it is planned with.
        max_draft_tokens .. length_weight: see :class:`slos_serve.planning.settings.PlannerSettings`.
        sure: how long a step as planned is, over how long it may come to be.
    """

    lengths: FloatArray
    survival: FloatArray
    acceptance: FloatArray
    max_draft_tokens: int
    aging_s: float
    max_implied_ttft_s: float
    length_weight: float
    sure: float


class Memory(NamedTuple):
    """What one plan leaves to the next once it has been carried out.

    ``shares``: float64 [NUM_SHARES], see :func:`slos_serve.planning.best_effort.shares_now`.
    """

    arrivals: Arrivals
    turn: Turn
    drafts: DraftPlan
    shares: FloatArray


class Admission(NamedTuple):
    """What admission came to: requests asked about and taken, states of the program, ``Admitted.status``; -1 when
    nobody asked."""

    asked: int
    taken: int
    labels: int
    status: int


class Planned(NamedTuple):
    """A plan: the arrays of :class:`slos_serve.core.plan.StepPlan`, its predicted seconds, and what comes with it."""

    slots: SlotArray
    tokens: IntArray
    reasons: IntArray
    drafts: IntArray
    held: SlotArray
    held_reasons: IntArray
    preempt: SlotArray
    admitted: SlotArray
    demoted: SlotArray
    predicted_s: float
    admission: Admission
    memory: Memory


@njit(cache=True)
def question_of(state: State, known: Known, memory: Memory, tiers: Tiers) -> Question:
    """What admission is asked with: the request that has the turn keeps its KV from promises."""
    total_blocks, kept = state.total_blocks, memory.turn.kept
    if kept != NOBODY:
        total_blocks -= peak_blocks(state.rows, kept, state.block_size)
    return Question(
        tiers,
        memory.drafts,
        longest_step_s(state, memory.arrivals),
        memory.arrivals.load,
        known.survival,
        total_blocks,
        known.max_implied_ttft_s,
        known.length_weight,
    )


@njit(cache=True)
def forecast_and_give_up(state: State, known: Known) -> tuple[SlotArray, SlotArray]:
    """Write forecasts and the paces of deadlines; returns those whose promise is lost, and who waits and asks."""
    forecast_lengths(state.rows, state.running, known.lengths)
    forecast_lengths(state.rows, state.waiting, known.lengths)
    pace_answers(state, known.survival)
    return give_up_lost(state), most_urgent(state)


@njit(cache=True)
def ask_now(state: State, known: Known, memory: Memory) -> Asked:
    """What admission would say of a state, for routers: with the arrivals, turn and drafts of the last plan."""
    _, asking = forecast_and_give_up(state, known)
    tiers = tiers_of(state, asking, known.acceptance)
    return admission_of(state, asking, question_of(state, known, memory, tiers))


@njit(cache=True)
def starting_order(state: State, shares: FloatArray) -> SlotArray:
    """Waiting slots that may use what is left over: those passed over by deadline (they may still make it), then
    streams that lost their KV, the oldest first, then best effort in the order of fair shares: as many as can have a
    seat beside the blocked ones and whoever has the turn."""
    waiting = state.waiting
    status = state.status[waiting]
    seats = state.max_num_seqs - len(state.running)
    if seats > 0:
        seats += 1 + int(state.rows["blocked"][waiting].sum())
    passed = waiting[status == UNDECIDED]
    passed = passed[np.argsort(state.rows["ttft_due_s"][passed], kind="mergesort")]
    others = waiting[status == BEST_EFFORT]
    streams = state.rows["output_tokens"][others] > 0
    cut_off = others[streams]
    cut_off = cut_off[np.argsort(state.rows["order"][cut_off], kind="mergesort")]
    return np.concatenate((passed, cut_off, in_fair_order(state, others[~streams], shares, seats)))


@njit(cache=True)
def take(state: State, asking: SlotArray, question: Question) -> tuple[SlotArray, BoolArray, Admission]:
    """Ask admission where a promise is open; returns the waiting slots served, bool [rows] of the running ones that are
    promised at last, and what admission came to."""
    fitting = np.zeros(len(state.rows), dtype=np.bool_)
    chosen = np.empty(len(asking), dtype=np.int64)
    if len(asking) == 0 and not (state.status[state.running] == UNDECIDED).any():
        return chosen, fitting, Admission(0, 0, 0, -1)
    asked, count = admission_of(state, asking, question), 0
    slots, admitted = asked.demand.slots, asked.admitted
    for i in range(len(slots)):
        slot = slots[i]
        if not admitted.taken[i]:
            continue
        if state.rows["running"][slot] == 0:
            chosen[count] = slot
            count += 1
        elif state.rows["status"][slot] == UNDECIDED:
            fitting[slot] = True
        state.status[slot] = ADMITTED
    answer = Admission(len(slots), int(admitted.taken.sum()), admitted.labels, admitted.status)
    return chosen[:count], fitting, answer


@njit(cache=True)
def in_engine_order(step: Step) -> IntArray:
    """int64 [4, entries]: running requests before waiting ones, as engines walk them."""
    entries = step.entries[:, : step.counts[ENTRIES]]
    first = step.state.rows["running"][entries[0]] == 1
    ordered = np.empty_like(entries)
    count = int(first.sum())
    for row in range(4):
        ordered[row, :count], ordered[row, count:] = entries[row][first], entries[row][~first]
    return ordered


@njit(cache=True)
def plan_step(state: State, known: Known, last: Memory) -> Planned:
    """Plan the step that starts at ``state.now_s``.

    Args:
        last: from the newest plan that was carried out.
    """
    rows, status = state.rows, state.status
    lost, asking = forecast_and_give_up(state, known)
    tiers = tiers_of(state, asking, known.acceptance)
    arrivals, turn = count_arrivals(state, last.arrivals), next_turn(state, last.turn, known.aging_s)
    longest_s = longest_step_s(state, arrivals)
    drafts = plan_drafts(state, tiers, last.drafts, known.max_draft_tokens, longest_s)
    memory = Memory(arrivals, turn, drafts, shares_now(state, last.shares))
    chosen, fitting, admission = take(state, asking, question_of(state, known, memory, tiers))
    rules = Rules(longest_s, known.sure, turn.kept, turn.kept if turn.due else NOBODY)
    step, sacrificed = form_step(state, chosen, starting_order(state, memory.shares), rules, drafts)
    fitting[sacrificed] = False
    slots, tokens, reasons, lengths = in_engine_order(step)
    count_begun(state, slots, memory.shares)
    for j in range(len(slots)):
        starts = reasons[j] == PREFILL_DEADLINE and rows["status"][slots[j]] == UNDECIDED
        fitting[slots[j]] = fitting[slots[j]] or starts
    broken = sacrificed[(rows["status"][sacrificed] == ADMITTED) & (status[sacrificed] == ADMITTED)]
    held = step.held[:, : step.counts[HELD]]
    return Planned(
        slots,
        tokens,
        reasons,
        lengths,
        held[0].copy(),
        held[1].copy(),
        np.concatenate((sacrificed, step.victims[: step.counts[PREEMPTED]])),
        np.flatnonzero(fitting),
        np.concatenate((lost, broken)),
        seconds(step),
        admission,
        memory,
    )
