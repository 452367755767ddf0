"""The demo scales with the engine and is the same for a seed."""

from __future__ import annotations

import pytest

from slos_serve.bench.demo_plan import DemoSettings, classes_yaml, demo_classes, fluid_rate, plan_demo
from slos_serve.files.class_file import parse_classes
from tests.unit.bench.builders import MODEL, small_plan


def test_a_seed_fixes_the_demo() -> None:
    assert small_plan(1).burst == small_plan(1).burst
    assert small_plan(1).burst != small_plan(2).burst


def test_rates_scale_with_the_engine() -> None:
    slow, fast = plan_demo(MODEL, DemoSettings()), plan_demo(MODEL.scaled(0.25), DemoSettings())
    assert fast.capacity_per_s == pytest.approx(4.0 * slow.capacity_per_s, rel=1e-6)
    for slow_class, fast_class in zip(slow.classes, fast.classes, strict=True):
        assert fast_class.slo.tpot_s == pytest.approx(slow_class.slo.tpot_s / 4.0, rel=0.01)


def test_a_longer_step_carries_more() -> None:
    assert fluid_rate(MODEL, 0.4) > fluid_rate(MODEL, 0.1) > 0.0


def test_calm_is_below_and_burst_above_capacity() -> None:
    plan = plan_demo(MODEL, DemoSettings(calm_s=400.0, burst_s=400.0))
    assert len(plan.calm) / 400.0 == pytest.approx(0.45 * plan.capacity_per_s, rel=0.1)
    assert len(plan.burst) / 400.0 == pytest.approx(1.7 * plan.capacity_per_s, rel=0.1)


def test_every_class_and_best_effort_are_in_both_phases() -> None:
    plan = plan_demo(MODEL, DemoSettings())
    for requests in (plan.warm_up, plan.calm, plan.burst):
        assert {request.slo_class for request in requests} == {"chat", "coding", "summarization", None}


def test_editing_makes_every_prompt_a_text_to_edit() -> None:
    plan, mixed = plan_demo(MODEL, DemoSettings(editing=True)), plan_demo(MODEL, DemoSettings())
    tasks = [request.prompt.rsplit("\n\n", 1)[-1] for request in plan.burst]
    assert all("text above" in task for task in tasks)
    assert {request.slo_class for request in plan.burst} == {request.slo_class for request in mixed.burst}


def test_request_ids_tell_the_phases_apart() -> None:
    plan = small_plan()
    ids = [request.request_id for request in (*plan.warm_up, *plan.calm, *plan.burst)]
    assert len(set(ids)) == len(ids)


def test_class_file_says_the_same_as_the_plan() -> None:
    classes = demo_classes(0.08)
    assert parse_classes(classes_yaml(classes), "demo").classes == classes.classes
