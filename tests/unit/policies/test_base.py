"""A stock policy promises nothing and learns nothing."""

from __future__ import annotations

import copy

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.perf.batch_time import BatchShape
from slos_serve.policies.base import Policy, StockPolicy
from tests.builders import EngineBuilder


class Idle(StockPolicy):
    """Plans nothing."""

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        return StepPlan()


def test_a_stock_policy_needs_nothing_but_a_plan_and_changes_no_row() -> None:
    engine = EngineBuilder()
    slot = engine.wait()
    policy: Policy = Idle()
    view = engine.view()
    before, state = view.table.rows.copy(), copy.deepcopy(vars(policy))
    policy.commit(policy.plan(engine.now_s, view), view, np.array([slot]))
    policy.on_step_done(BatchShape(10), 0.1)
    policy.on_verified(np.array([0]), np.array([2]), np.array([1]))
    policy.on_request_done(0, 10, 10)
    assert view.table.rows.tobytes() == before.tobytes()
    assert vars(policy) == state
