"""When a replica publishes and what: its planner's own admission inputs, summed up.

Runs where the planner runs, right after a plan, and shows the state that the next plan will start from, at the end of
the planned step. The sums come from the planner's own functions; nothing here has a theory of its own.
"""

from __future__ import annotations

import math

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.slo import check_number
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.admission import Admission, judge, write_forecasts
from slos_serve.planning.candidates import ADMITTED, demote_lost
from slos_serve.planning.freed_time import tokens_freed, tokens_gained
from slos_serve.planning.lengths import EDGES
from slos_serve.planning.planner import Planner
from slos_serve.planning.prefill_rate import FloatArray, prefill_rate
from slos_serve.routing.projection import after_step, view_copy
from slos_serve.routing.publication import FREED_AFTER_S, Publication
from slos_serve.routing.settings import PUBLISH_EVERY_S


class Publisher:
    """Makes the publications of one replica.

    Args:
        replica: its name.
        planner: whose state is published.
        model: the planner's batch-time model, uncorrected.
        every_s: longest time between two publications while steps are shorter than that.
    """

    def __init__(self, replica: str, planner: Planner, model: BatchTimeModel, every_s: float = PUBLISH_EVERY_S) -> None:
        self.every_s = check_number("publish_every_s", every_s, low=0.0, high=60.0, low_included=True)
        self._replica = replica
        self._planner = planner
        self._model = model
        self._sequence = 0
        self._last_s = -math.inf

    def after_plan(
        self, now_s: float, view: EngineView, plan: StepPlan, factor: float = 1.0, seen_until_s: float | None = None
    ) -> Publication | None:
        """A publication when waiting for the next plan would make the last one too old, else ``None``.

        Args:
            now_s: when the step begins.
            view: what was planned from, with the statuses that the plan wrote.
            plan: the plan.
            factor: online correction of the batch-time model.
            seen_until_s: requests that came by then are in ``view``; ``None`` for ``now_s``.
        """
        if now_s + plan.predicted_s - self._last_s < self.every_s:
            return None
        return self.publish(now_s, view, plan, factor, seen_until_s)

    def publish(
        self,
        now_s: float,
        view: EngineView,
        plan: StepPlan | None = None,
        factor: float = 1.0,
        seen_until_s: float | None = None,
    ) -> Publication:
        """A publication now; arguments as of :meth:`after_plan`. An idle replica publishes its empty view."""
        self._sequence += 1
        self._last_s = now_s
        return publication_of(
            self._planner,
            self._model,
            factor,
            view,
            now_s,
            plan,
            replica=self._replica,
            sequence=self._sequence,
            seen_until_s=seen_until_s,
        )


def own_admission(
    planner: Planner, coefficients: FloatArray, view: EngineView, now_s: float, *, forecast_memory: bool = False
) -> Admission:
    """The planner's admission of ``view`` at ``now_s``, without its consequences; writes ``expected_tokens`` only.

    KV is counted as the sum of peaks, whatever the planner's settings, unless ``forecast_memory``: sums that a mirror
    can add to, and stricter than the planner's own forecast.
    """
    write_forecasts(view, planner.settings, planner.lengths)
    return judge(
        view,
        now_s,
        coefficients,
        planner.settings,
        planner.lengths,
        forecast_memory=forecast_memory,
        count_freed=planner.settings.count_freed,
        longest_step_s=planner.longest_step_s(),
        most_open_tokens=planner.most_open_tokens(),
        drafts=planner.drafting.present,
    )


def _left_by_decodes(
    planner: Planner, coefficients: FloatArray, view: EngineView, found: Admission, moments_s: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Prefill tokens that decodes leave until each moment, and those gained by longer steps (float64 [F] each)."""
    none = np.zeros(len(moments_s))
    model = (found.periods_s, found.tokens_each, found.period_s_each)
    rate = prefill_rate(found.counts, *model, found.draft_s, coefficients, found.max_tokens)
    if not planner.settings.count_freed or planner.drafting.present.tokens.any() or rate <= 0.0:
        return none, none
    rows, margin = view.table.rows, planner.settings.tpot_margin
    freed = tokens_freed(
        rows, view.running, moments_s, found.start_s, coefficients, margin, planner.lengths.survival(), EDGES
    )
    gained = tokens_gained(
        rows, view.running, moments_s, found.start_s, *model, found.max_tokens, rate, coefficients, margin
    )
    return freed, gained


def publication_of(
    planner: Planner,
    model: BatchTimeModel,
    factor: float,
    view: EngineView,
    now_s: float,
    plan: StepPlan | None = None,
    *,
    replica: str,
    sequence: int = 0,
    seen_until_s: float | None = None,
) -> Publication:
    """Sum up what the planner would admit when it plans next: after ``plan``, or at once without one.

    Prompts that the planner would take count as owed, whether they have begun or not; what it passes over does not.
    ``view`` is only read.
    """
    settings = planner.settings
    coefficients = model.coefficients * (factor * (1.0 + planner.step_margin))
    ready_s = now_s if plan is None else now_s + plan.predicted_s
    view = view_copy(view) if plan is None else after_step(view, plan, ready_s)
    if settings.best_effort:
        active = np.concatenate((view.running, view.waiting))
        demote_lost(view.table.rows, active, ready_s, coefficients, np.empty_like(active))
    found = own_admission(planner, coefficients, view, ready_s)
    rows, taken, counts, pace_s = view.table.rows, found.taken, found.counts, found.pace_s
    promised = int(counts.sum()) + int(taken.sum())
    num_requests = len(view.running) + len(view.waiting)
    moments_s = ready_s + FREED_AFTER_S
    freed, gained = _left_by_decodes(planner, coefficients, view, found, moments_s)
    return Publication(
        replica=replica,
        sequence=sequence,
        time_s=now_s,
        ready_s=ready_s,
        seen_until_s=now_s if seen_until_s is None else seen_until_s,
        correction=factor,
        coefficients=coefficients,
        tpot_margin=settings.tpot_margin,
        max_implied_ttft_s=settings.max_implied_ttft_s,
        max_step_tokens=int(found.max_tokens),
        most_open_tokens=planner.most_open_tokens(),
        draft_s=found.draft_s,
        pace_s=pace_s,
        periods_s=found.periods_s.copy(),
        tokens_each=found.tokens_each,
        extra_s_each=found.period_s_each,
        counts=counts,
        in_tier=counts + np.bincount(found.tier, minlength=len(counts)),
        due_s=found.due_s[taken],
        cost_tokens=found.cost_tokens[taken],
        tier=found.tier[taken],
        weight=rows["weight"][found.slots[taken]],
        begun=(rows["status"][found.slots[taken]] == ADMITTED).astype(np.int64),
        memory=found.memory[taken],
        memory_left=found.memory_room - found.memory[taken].sum(axis=0),
        total_blocks=view.total_blocks,
        free_blocks=view.free_blocks,
        block_size=view.block_size,
        freed_at_s=moments_s,
        freed_tokens=freed,
        longer_tokens=gained,
        num_requests=num_requests,
        num_unpromised=max(num_requests - promised, 0),
        forecast_tokens=planner.lengths.table()[:, 0].copy(),
    )
