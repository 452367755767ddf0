"""SLOs-Serve's own policy: the planner, with its batch-time model corrected as steps run."""

from __future__ import annotations

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import SlotArray
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.online import OnlineCorrection
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from slos_serve.policies.base import IntArray

# Margin on step times until enough of them have been seen to know their spread.
INITIAL_MARGIN = 0.05


class SLOsServePolicy:
    """See :class:`slos_serve.policies.base.Policy`."""

    def __init__(
        self, model: BatchTimeModel, num_classes: int, settings: PlannerSettings | None = None, *, correct: bool = True
    ) -> None:
        self.planner = Planner(model, num_classes, settings)
        chosen = self.planner.settings
        self.correction = OnlineCorrection(quantile=chosen.step_quantile, initial_ratio_quantile=1.0 + INITIAL_MARGIN)
        self.model = model
        self._correct = correct
        if correct:
            self.planner.correct(1.0, INITIAL_MARGIN)

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Plan the step that starts at ``now_s``."""
        return self.planner.plan(now_s, view)

    def commit(self, plan: StepPlan, view: EngineView, ran: SlotArray) -> None:
        """Make the promises of a plan that was carried out; see :meth:`slos_serve.policies.base.Policy.commit`."""
        self.planner.commit(plan, view, ran)

    def on_step_done(self, shape: BatchShape, duration_s: float) -> None:
        """Follow the drift and the spread of step times."""
        if not self._correct:
            return
        self.correction.observe(shape, self.model.step_s(shape), duration_s)
        seen = self.correction
        self.planner.correct(seen.factor, seen.ratio_quantile - 1.0, seen.one_step_quantile - 1.0)

    def on_verified(self, class_index: IntArray, drafted: IntArray, accepted: IntArray) -> None:
        """Learn how often drafts of each class are right."""
        self.planner.acceptance.observe(class_index, drafted, accepted)

    def on_request_done(self, class_index: int, prompt_tokens: int, output_tokens: int) -> None:
        """Learn how long answers of the class are."""
        self.planner.lengths.observe(class_index, output_tokens)
