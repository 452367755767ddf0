"""SLOs-Serve's policy: the planner behind the interface, and its correction by measured steps."""

from __future__ import annotations

import numpy as np

from slos_serve.core.request import Status
from slos_serve.perf.batch_time import BatchShape
from slos_serve.policies.slos_serve import INITIAL_MARGIN, SLOsServePolicy
from tests.builders import OPT_13B_A100, EngineBuilder

SHAPE = BatchShape(new_tokens=300, context_tokens=2000, quad_tokens2=90_000, num_seqs=10)


def test_promises_are_made_by_the_commit_not_by_the_plan() -> None:
    engine = EngineBuilder()
    slot = engine.wait(200, due_in_s=1.0)
    policy, view = SLOsServePolicy(OPT_13B_A100, 1), engine.view()
    plan = policy.plan(engine.now_s, view)
    assert plan.admitted.tolist() == [slot]
    assert view.table.rows["status"][slot] == Status.UNDECIDED
    policy.commit(plan, view, plan.slots)
    assert view.table.rows["status"][slot] == Status.ADMITTED


def predicted_s(policy: SLOsServePolicy) -> float:
    """What the same step is planned to take."""
    engine = EngineBuilder()
    engine.wait(1000, due_in_s=3.0)
    return policy.plan(engine.now_s, engine.view()).predicted_s


def test_slower_steps_than_modelled_make_plans_slower_unless_correction_is_off() -> None:
    policies = [SLOsServePolicy(OPT_13B_A100, 1, correct=correct) for correct in (True, False)]
    before = [predicted_s(policy) for policy in policies]
    for policy in policies:
        for _ in range(200):
            policy.on_step_done(SHAPE, 1.3 * OPT_13B_A100.step_s(SHAPE))
    after = [predicted_s(policy) for policy in policies]
    assert after[0] > 1.15 * before[0]
    assert after[1] == before[1]
    assert policies[0].correction.ratio_quantile >= 1.0
    assert 0.0 < INITIAL_MARGIN < 0.2


def test_lengths_and_acceptance_are_learnt() -> None:
    policy = SLOsServePolicy(OPT_13B_A100, 2)
    before = policy.planner.lengths.table().copy()
    for _ in range(50):
        policy.on_request_done(1, 100, 900)
    after = policy.planner.lengths.table()
    assert after[1, 0] > before[1, 0]
    assert np.array_equal(after[0], before[0])
    rates = policy.planner.acceptance.mean().copy()
    policy.on_verified(np.ones(500, dtype=np.int64), np.full(500, 4), np.full(500, 4))
    assert policy.planner.acceptance.mean()[1] > rates[1]
