"""When a replica publishes and what: its planner's own admission inputs, summed up.

Runs where the planner runs, right after a plan, and shows the state that the next plan will start from, at the end of
the planned step. The sums come from the planner's own functions; nothing here has a theory of its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.slo import check_number
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.admission import Asked
from slos_serve.planning.planner import Planner
from slos_serve.planning.state import ADMITTED, FloatArray, state_of
from slos_serve.routing.projection import after_step, view_copy
from slos_serve.routing.publication import Publication
from slos_serve.routing.queued import queued_by_share
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
            view: what was planned from.
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


def own_admission(planner: Planner, coefficients: FloatArray, view: EngineView, now_s: float) -> Asked:
    """The planner's admission of ``view`` at ``now_s``, without its consequences; writes ``expected_tokens`` only."""
    return planner.ask_now(state_of(view, now_s, coefficients, planner.settings.margin, planner.shares.boost))


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
    asked = own_admission(planner, coefficients, view, ready_s)
    taken = asked.demand.slots[asked.admitted.taken]
    promised = int(asked.supply.counts.sum()) + len(taken)
    num_requests = len(view.running) + len(view.waiting)
    queued_shares, queued_tokens = queued_by_share(view, taken)
    boosted = np.flatnonzero(planner.shares.boost != 1.0)
    return Publication(
        replica=replica,
        sequence=sequence,
        time_s=now_s,
        ready_s=ready_s,
        seen_until_s=now_s if seen_until_s is None else seen_until_s,
        correction=factor,
        coefficients=coefficients,
        margin=settings.margin,
        max_implied_ttft_s=settings.max_implied_ttft_s,
        **_promised_of(asked, view),
        to_come=asked.to_come.ravel(),
        total_blocks=view.total_blocks,
        free_blocks=view.free_blocks,
        block_size=view.block_size,
        num_requests=num_requests,
        num_unpromised=max(num_requests - promised, 0),
        queued_shares=queued_shares,
        queued_tokens=queued_tokens,
        forecast_tokens=planner.lengths.table()[:, 0].copy(),
        boosted=boosted,
        boost=planner.shares.boost[boosted],
    )


def _promised_of(asked: Asked, view: EngineView) -> dict[str, Any]:
    """What is promised and what is left beside it, by the names of :class:`Publication`."""
    demand, supply, tiers, taken = asked.demand, asked.supply, asked.tiers, asked.admitted.taken
    memory = demand.blocks[taken]
    return {
        "max_step_tokens": int(supply.max_tokens),
        "draft_s": supply.draft_s,
        "pace_s": tiers.tpot_s,
        "periods_s": supply.periods_s,
        "tokens_each": supply.tokens_each,
        "extra_s_each": supply.extra_s_each,
        "counts": supply.counts,
        "in_tier": tiers.in_tier,
        "due_s": demand.due_s[taken],
        "cost_tokens": demand.tokens[taken],
        "tier": demand.tier[taken],
        "weight": demand.weight[taken],
        "needs_seat": demand.needs_seat[taken],
        "begun": (view.table.rows["status"][demand.slots[taken]] == ADMITTED).astype(np.int64),
        "memory": memory,
        "memory_left": supply.blocks - memory.sum(axis=0),
        "moments_s": supply.moments_s,
        "lent_tokens": supply.lent_tokens,
        "seats": supply.seats,
    }
