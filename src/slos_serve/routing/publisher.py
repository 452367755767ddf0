"""When a replica publishes and what: its planner's own admission inputs, summed up.

Runs where the planner runs and shows the state that the next plan will start from, at the end of the planned step. What
is needed of a step is copied right after its plan (:func:`snapshot_of`); summing up can wait until the step runs. The
sums come from the planner's own functions; nothing here has a theory of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A replica's requests as its next plan will find them; later steps change nothing of it.

    Attributes:
        now_s: when it was taken.
        ready_s: when the next plan is made.
        seen_until_s: requests that came by then are in ``view``.
        correction: factor between observed and modelled batch times.
        view: the engine at ``ready_s``.
    """

    now_s: float
    ready_s: float
    seen_until_s: float
    correction: float
    view: EngineView


def snapshot_of(
    view: EngineView,
    now_s: float,
    plan: StepPlan | None = None,
    correction: float = 1.0,
    seen_until_s: float | None = None,
) -> Snapshot:
    """A snapshot after the step of ``plan``, or of now without one; ``view`` is only read.

    Args:
        view: what was planned from.
        now_s: when the step begins.
        plan: of the step.
        correction: factor between observed and modelled batch times.
        seen_until_s: requests that came by then are in ``view``; ``None`` for ``now_s``.
    """
    ready_s = now_s if plan is None else now_s + plan.predicted_s
    after = view_copy(view) if plan is None else after_step(view, plan, ready_s)
    return Snapshot(now_s, ready_s, now_s if seen_until_s is None else seen_until_s, correction, after)


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

    def due(self, next_s: float) -> bool:
        """Whether the last publication would be too old by ``next_s``, when there is another chance to publish."""
        return next_s - self._last_s >= self.every_s

    def publish(self, snapshot: Snapshot) -> Publication:
        """A publication of ``snapshot``."""
        self._sequence += 1
        self._last_s = snapshot.now_s
        return publication_of(self._planner, self._model, snapshot, replica=self._replica, sequence=self._sequence)


def own_admission(planner: Planner, coefficients: FloatArray, view: EngineView, now_s: float) -> Asked:
    """The planner's admission of ``view`` at ``now_s``, without its consequences; writes ``expected_tokens`` only."""
    return planner.ask_now(state_of(view, now_s, coefficients, planner.settings.margin, planner.shares.boost))


def publication_of(
    planner: Planner, model: BatchTimeModel, snapshot: Snapshot, *, replica: str, sequence: int = 0
) -> Publication:
    """Sum up what the planner would admit when it plans next.

    Prompts that the planner would take count as owed, whether they have begun or not; what it passes over does not.

    Args:
        planner: of the replica.
        model: its batch-time model, uncorrected.
        snapshot: of its requests; of these only ``expected_tokens`` is written.
        replica, sequence: see :class:`Publication`.
    """
    settings, view = planner.settings, snapshot.view
    coefficients = model.coefficients * (snapshot.correction * (1.0 + planner.step_margin))
    asked = own_admission(planner, coefficients, view, snapshot.ready_s)
    taken = asked.demand.slots[asked.admitted.taken]
    promised = int(asked.supply.counts.sum()) + len(taken)
    num_requests = len(view.running) + len(view.waiting)
    queued_shares, queued_tokens = queued_by_share(view, taken)
    boosted = np.flatnonzero(planner.shares.boost != 1.0)
    return Publication(
        replica=replica,
        sequence=sequence,
        time_s=snapshot.now_s,
        ready_s=snapshot.ready_s,
        seen_until_s=snapshot.seen_until_s,
        correction=snapshot.correction,
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
