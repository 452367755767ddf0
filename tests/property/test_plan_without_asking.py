"""A step that is planned without asking admission is the step that asking would have given."""

from __future__ import annotations

import numpy as np

from slos_serve.core.request import Status
from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from tests.builders import OPT_13B_A100, EngineBuilder


def engine(seed: int) -> EngineBuilder:
    rng = np.random.default_rng(seed)
    built = EngineBuilder(total_blocks=int(rng.integers(300, 3000)), max_num_seqs=60)
    for _ in range(int(rng.integers(0, 25))):
        status = Status.BEST_EFFORT if rng.random() < 0.2 else Status.ADMITTED
        built.decode(tpot_s=float(rng.choice([0.05, 0.1])), ahead_s=float(rng.random()) * 0.1, status=status)
    for _ in range(int(rng.integers(1, 3))):
        built.prefilling(3000, int(rng.integers(1, 2900)), due_in_s=0.2 + float(rng.random()))
    for _ in range(int(rng.integers(1, 12))):
        built.wait(int(rng.integers(1, 3000)), due_in_s=0.1 + float(rng.random()) * 3.0)
    for _ in range(int(rng.integers(0, 3))):
        built.best_effort(int(rng.integers(1, 1000)))
    return built


def test_a_step_that_admission_cannot_change_is_the_same_without_asking() -> None:
    saved = Planner(OPT_13B_A100, 2)
    asked = Planner(OPT_13B_A100, 2, PlannerSettings(skip_admission=False))
    for seed in range(600):
        first, second = engine(seed), engine(seed)
        plan, again = saved.plan(first.now_s, first.view()), asked.plan(second.now_s, second.view())
        for name in ("slots", "tokens", "reasons", "held", "held_reasons", "preempt", "admitted", "demoted"):
            assert getattr(plan, name).tolist() == getattr(again, name).tolist(), (seed, name)
        assert plan.predicted_s == again.predicted_s
        assert (first.table.rows["status"] == second.table.rows["status"]).all()
    assert asked.counters.not_asked == 0
    assert saved.counters.not_asked > 25
    assert saved.counters.not_asked + saved.counters.admissions == asked.counters.admissions
