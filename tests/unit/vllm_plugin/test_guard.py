"""Faults are counted and told, never passed on; too many in a row disarm; overruns are followed by rest."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from slos_serve.vllm_plugin.guard import CALM_PLANS, MOST_REST_STEPS, Guard


def fail() -> None:
    raise RuntimeError("broken")


def test_a_fault_is_counted_by_kind_and_answered_with_none() -> None:
    guard = Guard(fault_limit=5)
    assert guard.run("propose", fail) is None
    assert guard.run("propose", lambda: 7) == 7
    assert guard.counts == {"propose": 1}
    assert guard.armed


def test_faults_in_a_row_disarm_and_a_planned_step_between_them_does_not() -> None:
    guard = Guard(fault_limit=3)
    for _ in range(10):
        guard.run("propose", fail)
        guard.run("commit", fail)
        guard.planned(in_time=True)
    assert guard.armed
    for _ in range(3):
        guard.run("propose", fail)
    assert not guard.armed


def test_the_first_second_fourth_fault_of_a_kind_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(fault_limit=1000)
    for _ in range(20):
        guard.run("propose", fail)
    told = [record for record in caplog.records if "propose failed" in record.getMessage()]
    assert len(told) == 5  # 1, 2, 4, 8, 16
    assert all(record.exc_info for record in told)


def test_overruns_rest_longer_each_time_and_recover() -> None:
    guard, rests = Guard(fault_limit=5), []
    for _ in range(10):
        guard.overran(0.02, 0.01)
        rests.append(guard.resting)
        guard.planned(in_time=False)
    assert rests == [0, 1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert MOST_REST_STEPS == 64
    for _ in range(8 * CALM_PLANS):
        guard.planned(in_time=True)
    guard.overran(0.02, 0.01)
    assert guard.resting == 0  # as at first
    assert guard.armed


def test_overruns_far_apart_never_rest_and_those_that_keep_coming_do() -> None:
    apart, often = Guard(fault_limit=5), Guard(fault_limit=5)
    rested = 0
    for _ in range(20):
        for guard, between in ((apart, CALM_PLANS), (often, CALM_PLANS - 1)):
            guard.overran(0.02, 0.01)
            for _ in range(between):
                guard.planned(in_time=True)
        rested += apart.resting
    assert rested == 0
    assert often.resting == MOST_REST_STEPS
