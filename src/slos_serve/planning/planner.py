"""The planner: one call before every step turns the state of an engine into a step plan.

    view -> Demand, Supply -> who is admitted -> Step -> StepPlan

A waiting request is promised nothing until its first prefill chunk runs: until then every plan decides anew, so a
request that fits badly gives way to two that fit well. Planning writes length forecasts into the table, nothing else.
Promises are written by :meth:`Planner.commit`, once it is known what ran; a plan that is dropped leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.step_time import per_token_s, roofline_s
from slos_serve.planning.admission import Asked, Expected, admission_of
from slos_serve.planning.algorithm1 import INFEASIBLE, STOPPED
from slos_serve.planning.arrivals import NO_ARRIVALS, Arrivals, count_arrivals
from slos_serve.planning.best_effort import NO_TURN, NOBODY, Turn, next_turn
from slos_serve.planning.demand import give_up_lost, most_urgent
from slos_serve.planning.drafting import Drafting, DraftPlan, Remembered
from slos_serve.planning.feasible import slack_tokens
from slos_serve.planning.form import PREFILL_DEADLINE, form
from slos_serve.planning.lengths import LengthForecast, forecast_lengths
from slos_serve.planning.settings import PlannerSettings
from slos_serve.planning.state import (
    ADMITTED,
    BEST_EFFORT,
    UNDECIDED,
    State,
    held_blocks,
    peak_blocks,
    state_of,
)
from slos_serve.planning.step import ENTRIES, HELD, NO_MEMORY, PREEMPTED, Step, seconds
from slos_serve.planning.supply import kv_shortage
from slos_serve.planning.work import Rules

# A step of prompts takes at most this share of the tightest TTFT, so that a prompt that arrives meanwhile is in time by
# a step of its own; and at least this many times a step's fixed cost, or fixed costs would take most of the time.
STEP_SHARE_OF_TTFT, LEAST_STEP_FIXED = 0.5, 4.0
# Load of promised prompts from which on best effort leaves promised decodes all the lead they can have.
FULL_LEAD_LOAD = 0.2
_NONE: SlotArray = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class PlannerCounters:
    """What the planner did, for metrics and benchmarks (counts of committed plans; they only grow)."""

    plans: int = 0
    admissions: int = 0
    labels: int = 0
    greedy_answers: int = 0
    infeasible_musts: int = 0
    demoted: int = 0


class Pending(NamedTuple):
    """What the newest plan leaves to the next one when it is committed."""

    plan: StepPlan
    turn: Turn
    arrivals: Arrivals
    seen: Remembered
    drafts: DraftPlan
    asked: Asked | None


class Planner:
    """Plans steps of one engine.

    Args:
        model: batch times of the engine.
        num_classes: SLO classes that requests may belong to.
        settings: how cautious it is.
    """

    def __init__(self, model: BatchTimeModel, num_classes: int, settings: PlannerSettings | None = None) -> None:
        self.settings = settings or PlannerSettings()
        self.lengths = LengthForecast(num_classes, self.settings.length_quantile)
        self.drafting = Drafting(num_classes, self.settings.max_draft_tokens, self.settings.acceptance_confidence)
        self.counters = PlannerCounters()
        self._arrivals, self._turn = NO_ARRIVALS, NO_TURN
        self._pending: Pending | None = None
        self._model = model
        self.correct(1.0)

    def correct(self, factor: float, spread: float | None = None) -> None:
        """Plan from now on as if batches took ``factor`` times what the model says (online correction).

        Args:
            factor: measured over modelled, centre.
            spread: how much slower than that batches are planned; at least the settings' ``margin``, and that for
                ``None``.
        """
        self.step_margin = max(self.settings.margin, spread or 0.0)
        self.coefficients = self._model.coefficients * (factor * (1.0 + self.step_margin))

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Plan the step that starts at ``now_s``; promises are made by :meth:`commit`."""
        self.forecast(view)
        state = state_of(view, now_s, self.coefficients, self.settings.margin)
        demoted = give_up_lost(state)
        asking = most_urgent(state)
        arrivals = count_arrivals(state, state.waiting, self._arrivals)
        turn = next_turn(state, self._turn, self.settings.aging_s)
        longest_s = self._longest_step_s(arrivals)
        seen, drafts = self.drafting.choose(state, asking, longest_s)
        asked = None
        if anyone_asks(state, asking):
            asked = self.admit(state, asking, self._expected(arrivals), drafts, turn)
        chosen, fitting = _NONE, _NONE
        if asked is not None:
            taken = asked.demand.slots[asked.admitted.taken]
            state.status[taken] = ADMITTED
            on_engine = state.rows["running"][taken] == 1
            chosen, fitting = taken[~on_engine], taken[on_engine]
            fitting = fitting[state.rows["status"][fitting] == UNDECIDED]
        load_share = float(arrivals.load[0].sum()) * per_token_s(self.coefficients)
        spare_s = self._spare_s(state, asked, longest_s)
        rules = Rules(longest_s, min(load_share / FULL_LEAD_LOAD, 1.0), spare_s, turn.kept, turn.slot_due)
        step, sacrificed = self._form(state, chosen, starting_order(state, chosen), rules, drafts)
        plan = step_plan(step, demoted, fitting, sacrificed, self.settings.max_draft_tokens > 0)
        self._pending = Pending(plan, turn, arrivals, seen, drafts, asked)
        return plan

    def commit(self, plan: StepPlan, view: EngineView, ran: SlotArray) -> None:
        """The plan was carried out: write its promises into the table and learn from it.

        Args:
            plan: from :meth:`plan`.
            view: what it was planned from.
            ran: int64, slots that really ran. A request is promised its SLO only if it ran, or was running already.
        """
        rows = view.table.rows
        kept = plan.admitted[np.isin(plan.admitted, ran) | (rows["running"][plan.admitted] == 1)]
        rows["status"][kept] = ADMITTED
        rows["status"][plan.demoted] = BEST_EFFORT
        self.counters.plans += 1
        self.counters.demoted += len(plan.demoted)
        pending, self._pending = self._pending, None
        if pending is None or pending.plan is not plan:
            return
        self._turn, self._arrivals = pending.turn, pending.arrivals
        self.drafting.keep(pending.seen, pending.drafts)
        if pending.asked is not None:
            admitted = pending.asked.admitted
            self.counters.admissions += 1
            self.counters.labels += admitted.labels
            self.counters.greedy_answers += admitted.status == STOPPED
            self.counters.infeasible_musts += admitted.status == INFEASIBLE

    @property
    def newest_admission(self) -> Asked | None:
        """What the newest plan asked Algorithm 1; ``None`` when nobody asked, or once it was committed."""
        return self._pending.asked if self._pending is not None else None

    def forecast(self, view: EngineView) -> None:
        """Write ``expected_tokens`` of every request in the view."""
        table = self.lengths.table()
        forecast_lengths(view.table.rows, view.running, table)
        forecast_lengths(view.table.rows, view.waiting, table)

    def admit(
        self, state: State, asking: SlotArray, expected: Expected, drafts: DraftPlan, turn: Turn, peaks: bool = False
    ) -> Asked:
        """Algorithm 1 on a state; ``peaks`` counts KV as the sum of forecast peaks, which is stricter and adds up."""
        kept = 0 if turn.kept == NOBODY else peak_blocks(state.rows, turn.kept, state.block_size)
        return admission_of(state, asking, self.settings, expected, drafts, state.total_blocks - int(kept), peaks)

    def longest_step_s(self) -> float:
        """How long a step of prompts may last, as of the last plan."""
        return self._longest_step_s(self._arrivals)

    def admission_now(self, state: State) -> Asked:
        """What admission would say of a state, for routers: with the lengths and the turn of the last plan."""
        expected = self._expected(self._arrivals)
        return self.admit(state, most_urgent(state), expected, self.drafting.present, self._turn, peaks=True)

    def _expected(self, arrivals: Arrivals) -> Expected:
        return Expected(self._longest_step_s(arrivals), arrivals.load, self.lengths.survival())

    def _longest_step_s(self, arrivals: Arrivals) -> float:
        least_s = LEAST_STEP_FIXED * roofline_s(self.coefficients, 0.0)
        return max(STEP_SHARE_OF_TTFT * arrivals.tightest_s, float(least_s))

    def _spare_s(self, state: State, asked: Asked | None, longest_s: float) -> float:
        """How long promised prompts can wait; a step is kept back, because prompts end within steps."""
        if asked is None or asked.admitted.status == INFEASIBLE:
            return 0.0
        share = kv_shortage(state)
        if share <= 0.0:
            return 0.0
        slack_s = slack_tokens(asked.admitted.taken, asked.demand, asked.supply) * per_token_s(self.coefficients)
        return share * max(slack_s - longest_s, 0.0) if np.isfinite(slack_s) else 0.0

    def _form(
        self, state: State, chosen: SlotArray, starting: SlotArray, rules: Rules, drafts: DraftPlan
    ) -> tuple[Step, list[int]]:
        """The step; while nothing could run for want of KV, the request that is cheapest to lose gives its own back."""
        step, sacrificed = form(state, chosen, starting, rules, drafts), []
        while step.counts[ENTRIES] == 0 and (step.held[1, : step.counts[HELD]] == NO_MEMORY).any():
            candidates = state.running[state.rows["blocked"][state.running] == 0]
            if len(candidates) < 2:
                break
            victim = cheapest_to_lose(state, candidates, rules.kept)
            sacrificed.append(victim)
            state = state._replace(
                running=state.running[state.running != victim],
                free_blocks=state.free_blocks + int(held_blocks(state.rows, victim, state.block_size)),
            )
            if victim == rules.kept:
                rules = rules._replace(kept=NOBODY, turn=NOBODY)
            step = form(state, chosen, starting, rules, drafts)
        return step, sacrificed


def anyone_asks(state: State, asking: SlotArray) -> bool:
    """Whether admission has anything to say: a promise is open, or a promised request waits to start."""
    return len(asking) > 0 or bool((state.status[state.running] == UNDECIDED).any())


def starting_order(state: State, chosen: SlotArray) -> SlotArray:
    """Waiting slots that may use what is left over: those passed over by deadline (they may still make it), then best
    effort, first come first."""
    waiting, rows = state.waiting, state.rows
    rest = waiting[state.status[waiting] != ADMITTED] if len(chosen) else waiting
    passed = rest[state.status[rest] == UNDECIDED]
    others = rest[state.status[rest] == BEST_EFFORT]
    passed = passed[np.argsort(rows["ttft_due_s"][passed], kind="stable")]
    others = others[np.argsort(rows["order"][others], kind="stable")]
    return np.concatenate((passed, others))


def cheapest_to_lose(state: State, running: SlotArray, kept: int) -> int:
    """Best effort before promises; of the former the youngest, of the latter the one that has computed least."""
    promised = (state.status[running] == ADMITTED) | (running == kept)
    rows: RequestArray = state.rows
    cost = np.where(promised, rows["computed_tokens"][running], -rows["order"][running] - 1)
    return int(running[np.lexsort((cost, promised))[0]])


def step_plan(step: Step, lost: SlotArray, fitting: SlotArray, sacrificed: list[int], drafts: bool) -> StepPlan:
    """The plan that carries out a step. Engines walk running requests before waiting ones."""
    rows, status = step.state.rows, step.state.status
    entries = step.entries[:, : step.counts[ENTRIES]]
    slots, tokens, reasons, lengths = entries[:, np.argsort(1 - rows["running"][entries[0]], kind="stable")]
    promised = slots[reasons == PREFILL_DEADLINE]
    started = promised[rows["status"][promised] == UNDECIDED]
    gone = np.array(sacrificed, dtype=np.int64)
    broken = gone[status[gone] == ADMITTED]
    admitted = np.concatenate((fitting[~np.isin(fitting, gone)], started[~np.isin(started, fitting)]))
    held = step.held[:, : step.counts[HELD]]
    return StepPlan(
        slots=slots,
        tokens=tokens,
        reasons=reasons,
        held=held[0].copy(),
        held_reasons=held[1].copy(),
        preempt=np.concatenate((gone, step.victims[: step.counts[PREEMPTED]])),
        admitted=admitted,
        demoted=np.concatenate((lost, broken[rows["status"][broken] == ADMITTED])),
        predicted_s=float(seconds(step)),
        draft_tokens=lengths.copy() if drafts else _NONE,
    )
