"""The planner: one call before every step turns the state of an engine into a step plan.

    view -> Demand, Supply -> who is admitted -> Step -> StepPlan          (``plan_step.py``)

A waiting request is promised nothing until its first prefill chunk runs: until then every plan decides anew, so a
request that fits badly gives way to two that fit well. Planning writes forecasts into the table, nothing else.
Promises are written by :meth:`Planner.commit`, once it is known what ran; a plan that is dropped leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import NUM_SHARES, RequestArray, SlotArray
from slos_serve.perf.acceptance import AcceptanceEstimate
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.class_shares import ClassShares
from slos_serve.perf.lengths import LengthForecast
from slos_serve.planning.admission import Asked
from slos_serve.planning.algorithm1 import INFEASIBLE, STOPPED
from slos_serve.planning.arrivals import NO_ARRIVALS, Arrivals
from slos_serve.planning.best_effort import NO_TURN
from slos_serve.planning.drafting import DraftPlan, no_drafts
from slos_serve.planning.plan_step import Admission, Known, Memory, ask_now, plan_step
from slos_serve.planning.settings import PlannerSettings
from slos_serve.planning.state import ADMITTED, BEST_EFFORT, UNDECIDED, State, state_of

_NONE: SlotArray = np.empty(0, dtype=np.int64)
# However wildly steps vary, a step that brings a first token may take this share of the time until that is due.
LEAST_SURE = 0.5


@dataclass(slots=True)
class PlannerCounters:
    """What the planner did, for metrics and benchmarks (counts of committed plans; they only grow)."""

    plans: int = 0
    admissions: int = 0
    labels: int = 0
    greedy_answers: int = 0
    infeasible_musts: int = 0
    demoted: int = 0


def promises_made(plan: StepPlan, rows: RequestArray, ran: SlotArray) -> SlotArray:
    """Slots that a plan promises their SLO once the slots ``ran`` have run: these, and those that ran already."""
    if len(plan.admitted) == 0:
        return plan.admitted
    runs = np.zeros(len(rows), dtype=np.bool_)
    runs[ran] = True
    asked = plan.admitted
    made: SlotArray = asked[runs[asked] | (rows["running"][asked] == 1)]
    return made


class Planner:
    """Plans steps of one engine.

    Args:
        model: batch times of the engine.
        num_classes: SLO classes that requests may belong to.
        settings: how cautious it is.

    Attributes:
        lengths: how long answers are, learnt.
        acceptance: how often drafts are right, learnt.
        shares: how much of what each class, and each tenant in it, asks for is promised.
    """

    def __init__(self, model: BatchTimeModel, num_classes: int, settings: PlannerSettings | None = None) -> None:
        self.settings = settings or PlannerSettings()
        self.lengths = LengthForecast(num_classes, self.settings.length_quantile)
        self.acceptance = AcceptanceEstimate(num_classes, self.settings.acceptance_confidence)
        self.shares = ClassShares(num_classes, self.settings.fairness)
        self.counters = PlannerCounters()
        self._memory = Memory(NO_ARRIVALS, NO_TURN, no_drafts(), np.zeros(NUM_SHARES))
        self._newest: tuple[StepPlan, Memory, Admission] | None = None
        self._modelled = model.coefficients
        self.correct(1.0)

    def correct(self, factor: float, spread: float | None = None, spread_of_one: float = 0.0) -> None:
        """Plan from now on as if batches took ``factor`` times what the model says (online correction).

        Args:
            factor: measured over modelled, centre.
            spread: how much slower than that batches are planned; at least the settings' ``margin``, and that for
                ``None``.
            spread_of_one: how much slower than the centre one step may be, where no others even it out.
        """
        self.step_margin = max(self.settings.margin, spread or 0.0)
        self._sure = min(max((1.0 + self.step_margin) / (1.0 + spread_of_one), LEAST_SURE), 1.0)
        self.coefficients = self._modelled * (factor * (1.0 + self.step_margin))

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Plan the step that starts at ``now_s``; promises are made by :meth:`commit`."""
        state = state_of(view, now_s, self.coefficients, self.settings.margin, self.shares.boost)
        found = plan_step(state, self.known(), self._memory)
        plan = StepPlan(
            slots=found.slots,
            tokens=found.tokens,
            reasons=found.reasons,
            held=found.held,
            held_reasons=found.held_reasons,
            preempt=found.preempt,
            admitted=found.admitted,
            demoted=found.demoted,
            predicted_s=found.predicted_s,
            draft_tokens=found.drafts if self.settings.max_draft_tokens > 0 else _NONE,
        )
        self._newest = plan, found.memory, found.admission
        return plan

    def commit(self, plan: StepPlan, view: EngineView, ran: SlotArray) -> None:
        """The plan was carried out: write its promises into the table and learn from it.

        Args:
            plan: from :meth:`plan`.
            view: what it was planned from.
            ran: int64, slots that really ran. A request is promised its SLO only if it ran, or was running already.
        """
        rows = view.table.rows
        made, demoted = promises_made(plan, rows, ran), plan.demoted
        if len(made) or len(demoted):
            decided = np.concatenate((made, demoted[rows["status"][demoted] == UNDECIDED]))
            promised = np.arange(len(decided)) < len(made)
            self.shares.decided(rows["share"][decided], promised, rows["weight"][decided])
            rows["status"][made], rows["status"][demoted] = ADMITTED, BEST_EFFORT
        self.counters.plans += 1
        self.counters.demoted += len(plan.demoted)
        newest, self._newest = self._newest, None
        if newest is None or newest[0] is not plan:
            return
        _, self._memory, admission = newest
        self.counters.admissions += admission.asked > 0
        self.counters.labels += admission.labels
        self.counters.greedy_answers += admission.status == STOPPED
        self.counters.infeasible_musts += admission.status == INFEASIBLE

    @property
    def newest_admission(self) -> Admission | None:
        """What admission came to in the newest plan; ``None`` once it was committed."""
        return self._newest[2] if self._newest is not None else None

    @property
    def drafts(self) -> DraftPlan:
        """Draft lengths of the last plan that was carried out."""
        return self._memory.drafts

    @property
    def arrivals(self) -> Arrivals:
        """What recent arrivals ask for, as of the last plan that was carried out."""
        return self._memory.arrivals

    def known(self) -> Known:
        """What is learnt and set, as kernels take it."""
        settings = self.settings
        return Known(
            self.lengths.table(),
            self.lengths.survival(),
            self.acceptance.lower(),
            int(settings.max_draft_tokens),
            float(settings.aging_s),
            float(settings.max_implied_ttft_s),
            float(settings.length_weight),
            self._sure,
        )

    def ask_now(self, state: State) -> Asked:
        """See :func:`slos_serve.planning.plan_step.ask_now`; writes length forecasts only."""
        return ask_now(state, self.known(), self._memory)
