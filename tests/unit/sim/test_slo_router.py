"""SLO-aware routing in virtual time: bursts, prefixes, deaths, staleness, determinism."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.recording import Recording
from slos_serve.sim.routers import SLO_ORDERS
from slos_serve.workload.calls import Workload
from slos_serve.workload.scenarios import make_workload
from tests.sim_builders import CHAT, GPU, run, workload

LIMITS = EngineLimits(kv_capacity_tokens=66_000)


def _burst(count: int, prompt: int = 1500, output: int = 20) -> Workload:
    """All at once."""
    return workload([0.5] * count, [prompt] * count, [output] * count)


def _routed(load: Workload, router: str = "slo", replicas: int = 2, **settings: object) -> Recording:
    return run(load, "slos-serve", GPU, LIMITS, router=router, replicas=replicas, **settings)


@pytest.mark.parametrize("router", sorted(SLO_ORDERS))
def test_every_call_completes_and_equal_seeds_give_equal_runs(router: str) -> None:
    load = make_workload("mixed", 6.0, 120, seed=1, arrivals="gamma:4")
    first, second = _routed(load, router), _routed(load, router)
    assert first.completed.all()
    assert first.digest() == second.digest()
    assert set(first.calls["replica"].tolist()) == {0, 1}


def test_mirrors_follow_planners_that_draft() -> None:
    drafter = dataclasses.replace(GPU, k_s_s=1e-3)
    load = make_workload("mixed", 6.0, 120, seed=1, arrivals="gamma:4", acceptance=0.7)
    recording = run(load, "slos-serve", drafter, LIMITS, router="slo", replicas=2, drafter="opt-125m")
    assert recording.completed.all()
    assert recording.num_drafted > 1000
    plain = _routed(load)
    assert summarize_run(recording).attained >= summarize_run(plain).attained


def test_a_burst_is_spread_over_those_that_attain() -> None:
    recording = _routed(_burst(12), "slo-pack")
    first_s = recording.token_s[recording.token_start]
    in_time = first_s <= CHAT.slo.ttft_s(0.0)
    # One replica alone prefills some five such prompts in a second.
    assert 8 <= in_time.sum() <= 12
    assert np.bincount(recording.calls["replica"]).min() >= 4
    alone = _routed(_burst(12), replicas=1)
    assert in_time.sum() >= 1.8 * (alone.token_s[alone.token_start] <= CHAT.slo.ttft_s(0.0)).sum()


def test_declined_calls_of_a_class_may_be_rejected() -> None:
    served, refused = _routed(_burst(40)), _routed(_burst(40), reject_classes=["chat"])
    assert served.completed.all()
    assert 5 <= refused.rejected.sum() <= 35
    assert (refused.completed | refused.rejected).all()
    with pytest.raises(InvalidFieldError, match="reject_classes"):
        _routed(_burst(2), reject_classes=["caht"])


def test_rounds_stay_where_their_prefix_is() -> None:
    load = make_workload("tool", 0.6, 30, seed=0)
    recording = _routed(load)
    replica = recording.calls["replica"]
    before = np.flatnonzero(load.calls["next_call"] >= 0)
    stayed = replica[before] == replica[load.calls["next_call"][before]]
    assert stayed.mean() > 0.75
    packed = _routed(load, "slo-spread")
    assert recording.calls["cached_tokens"].sum() > packed.calls["cached_tokens"].sum()


def test_a_dead_replica_gets_nothing_more_and_its_calls_are_routed_again() -> None:
    load = make_workload("chat", 4.0, 80, seed=2, arrivals="poisson")
    recording = _routed(load, replicas=3, deaths=[(5.0, 1)])
    late = recording.calls["arrival_s"] > 5.0
    assert late.any() and not (recording.calls["replica"][late] == 1).any()
    assert (recording.completed | (recording.calls["replica"] == 1)).all()


def test_a_replica_that_first_plans_late_publishes_it_with_plan_ahead() -> None:
    late = workload([5.0, 5.5, 6.0], [1000, 1000, 1000], [50, 50, 50])
    assert _routed(late, plan_ahead=True, publish_every_s=0.01).completed.all()


@pytest.mark.parametrize("settings", [{"publish_delay_s": 0.2}, {"publish_every_s": 1.0}, {"plan_ahead": True}])
def test_old_news_costs_little_of_a_burst(settings: dict[str, Any]) -> None:
    fresh, stale = _routed(_burst(16)), _routed(_burst(16), **settings)
    assert stale.completed.all()
    due_s = CHAT.slo.ttft_s(0.0)
    in_time = [(one.token_s[one.token_start] <= due_s).sum() for one in (fresh, stale)]
    assert in_time[1] >= in_time[0] - 2


def test_only_planners_can_be_mirrored() -> None:
    with pytest.raises(InvalidFieldError, match="slos-serve"):
        run(_burst(2), "vllm", router="slo")


def test_routers_that_share_the_replicas_attain_nearly_as_much_as_one() -> None:
    load = make_workload("chat", 9.0, 300, seed=3, arrivals="gamma:4")
    shares = []
    for settings in ({}, {"routers": 4}, {"routers": 4, "router_tries": 0}):
        outcome = summarize_run(_routed(load, "slo-spread", replicas=4, **settings))
        assert outcome.unfinished == 0
        shares.append(outcome.attained)
    one, asking, alone = shares
    assert asking >= 0.95 * one
    # Asking a second replica brings less with today's planner than seeds differ by; it must not cost anything.
    assert asking >= 0.98 * alone
    with pytest.raises(InvalidFieldError, match="routers"):
        _routed(load, replicas=2, routers=3)
