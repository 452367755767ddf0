"""When to ask again, how much room is left, and whose clock is ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slos_serve.core.verdict import Why
from slos_serve.routing import warm_up
from slos_serve.routing.clock_offset import WINDOW_S, ClockOffset
from slos_serve.routing.headroom import LONGEST_TTFT_S, MOST, fullness, headroom, promises, standard_ttft_s
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.retry_after import LATEST_S, SOONEST_S, UNKNOWN_S, retry_after_s, room_in_s
from slos_serve.routing.router import RoutingDecision, route
from tests.builders import OPT_13B_A100
from tests.unit.routing.fleet import NOW_S, loaded, mirrors_of, published, request


def test_room_comes_with_owed_prompts_computed_and_decodes_that_end() -> None:
    few, many, owing = loaded(10), loaded(40), loaded(10)
    owing.wait(3000, due_in_s=5.0)
    mirrors = mirrors_of(few=few, many=many, owing=owing)
    waits = {name: room_in_s(NOW_S, 0, mirrors, mirrors.position(name)) for name in mirrors}
    assert waits["many"] < waits["few"] < waits["owing"]
    # Ten decodes at 100 ms (less the margin) a token and as many tokens as are forecast: one of them ends soonest.
    tokens = float(mirrors.arrays.forecast_tokens[0, 0, 0])
    pace_s = float(mirrors.arrays.pace_s[0].min())
    assert waits["few"] == pytest.approx(tokens * pace_s / 10)


def test_the_answer_is_bounded_and_stale_replicas_are_not_counted_on() -> None:
    mirrors = mirrors_of(a=loaded(200, total_blocks=40_000))
    assert retry_after_s(NOW_S, 0, mirrors, 1.0) == SOONEST_S
    assert retry_after_s(NOW_S + 100.0, 0, mirrors, 1.0) == UNKNOWN_S
    assert retry_after_s(NOW_S, 0, Mirrors(), 1.0) == UNKNOWN_S
    lone = loaded(1)
    assert SOONEST_S < retry_after_s(NOW_S, 0, mirrors_of(a=lone), 1.0) <= LATEST_S


def test_headroom_shrinks_with_load_and_reserves_nothing() -> None:
    idle, busy = published(loaded(0, total_blocks=1000)), published(loaded(40, total_blocks=1000))
    first = headroom(idle, request(), NOW_S, most=200)
    assert 200 > first > headroom(busy, request(), NOW_S, most=200) > 0
    assert headroom(idle, request(), NOW_S, most=200) == first
    assert headroom(idle, request(), NOW_S) == MOST
    assert headroom(idle, request(9000, due_in_s=0.1), NOW_S) == 0


def test_fullness_takes_the_class_with_least_room() -> None:
    publication = published(loaded(30))
    assert promises(publication) == 30
    assert fullness(publication, 0, {"chat": 10, "code": 30}) == pytest.approx(0.75)
    assert fullness(publication, 10, {"chat": 0}) == pytest.approx(40 / 30)
    assert fullness(published(loaded(0)), 2, {"chat": 0}) == 3.0


def test_the_offset_is_the_shortest_delay_of_the_last_seconds() -> None:
    offset = ClockOffset()
    assert offset.observe(10.0, 110.5) == pytest.approx(100.5)
    assert offset.observe(11.0, 111.1) == pytest.approx(100.1)
    # A message that was held up does not move it, nor does one that is received out of order.
    assert offset.observe(12.0, 115.0) == pytest.approx(100.1)
    assert offset.observe(11.5, 112.0) == pytest.approx(100.1)
    # What is older than the window counts no more.
    assert offset.observe(16.2, 111.2 + WINDOW_S + 0.5) == pytest.approx(100.5)


@pytest.mark.parametrize("drift", [500e-6, -500e-6])
def test_a_day_of_drift_leaves_the_offset_right(drift: float) -> None:
    rng = np.random.default_rng(0)
    offset = ClockOffset()
    worst_s = 0.0
    for sent_s in np.arange(0.0, 86_400.0, 0.5).tolist():
        received_s = 1000.0 + sent_s * (1.0 + drift) + 0.0002 + rng.exponential(0.001)
        told_s = offset.observe(sent_s, received_s)
        worst_s = max(worst_s, abs(told_s - (1000.0 + sent_s * drift)))
    assert worst_s < 0.005


def test_warming_up_takes_every_branch_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Why] = []
    real = route

    def watched(*args: Any) -> RoutingDecision:
        decision: RoutingDecision = real(*args)
        seen.append(decision.reason)
        return decision

    monkeypatch.setattr(warm_up, "route", watched)
    warm_up.warm_up_routing()
    assert seen == [Why.FITS_AT_PREFIX, Why.ALL_FULL, Why.NO_SLO, Why.FITS]


def test_a_standard_prompt_waits_behind_what_is_owed() -> None:
    idle, busy, owing = loaded(0), loaded(60), loaded(60)
    owing.wait(3000, due_in_s=5.0)
    found = [standard_ttft_s(published(engine), NOW_S) for engine in (idle, busy, owing)]
    assert found == sorted(found) and found[0] < found[1] < found[2]
    assert found[0] == pytest.approx(OPT_13B_A100.zero_load_s(512), rel=0.5)
    assert standard_ttft_s(published(idle), NOW_S, prompt_tokens=1024) > found[0]


def test_a_replica_without_room_for_prompts_is_told_by_a_bound() -> None:
    assert standard_ttft_s(published(loaded(4000, total_blocks=200_000)), NOW_S) == LONGEST_TTFT_S
