"""The autoscaling policy: replicas wanted for what replicas report."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from slos_serve.ray_serve.autoscaling import headroom_policy
from slos_serve.routing.demand import FULLNESS, TARGET_FULLNESS


def wanted(replicas: int, *fullness: float, requests: float = 0.0) -> float:
    metrics = {FULLNESS: dict(enumerate(fullness))} if fullness else {}
    found, state = headroom_policy(
        SimpleNamespace(current_num_replicas=replicas, aggregated_metrics=metrics, total_num_requests=requests)
    )
    assert state == {}
    return found


def test_holds_the_mean_at_the_target() -> None:
    assert wanted(4, *[TARGET_FULLNESS] * 4) == pytest.approx(4)
    assert wanted(4, 1.4, 1.4, 1.4, 1.4) == pytest.approx(8)
    assert wanted(4, 0.35, 0.35, 0.35, 0.35) == pytest.approx(2)


def test_stays_until_replicas_have_reported() -> None:
    assert wanted(3) == 3
    assert headroom_policy(
        SimpleNamespace(current_num_replicas=2, aggregated_metrics=None, total_num_requests=0.0)
    ) == (2, {})


def test_those_that_start_count_like_the_others() -> None:
    assert wanted(3, 0.7, 0.7) == pytest.approx(3)


def test_none_wakes_for_a_request_and_sleeps_without_one() -> None:
    assert wanted(0) == 0.0
    assert wanted(0, requests=1.0) == 1.0
    assert wanted(2, 0.0, 0.0) == 0.0
    assert wanted(2, 0.0, 0.0, requests=3.0) == 1.0, "requests without a promise run"
