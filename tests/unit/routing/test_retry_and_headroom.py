"""When to ask again, how much room is left, and whose clock is ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slos_serve.core.verdict import Why
from slos_serve.routing import warm_up
from slos_serve.routing.clock_offset import WINDOW_S, ClockOffset
from slos_serve.routing.headroom import (
    LONGEST_TTFT_S,
    MOST,
    MOST_BUSY,
    Room,
    busy,
    fullness,
    headroom,
    headroom_prefill_tokens,
    next_tpot_s,
    promises,
    standard_ttft_s,
    together,
    with_attention,
)
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.retry_after import (
    LATEST_S,
    LEAST_STEP_S,
    SOONEST_S,
    UNKNOWN_S,
    RetryTimes,
    rooms_after_s,
)
from slos_serve.routing.router import RoutingDecision, RoutingRequest, route
from tests.builders import OPT_13B_A100, EngineBuilder
from tests.unit.routing.fleet import NOW_S, loaded, mirrors_of, published, request


def first_room_s(engine: EngineBuilder, asked: RoutingRequest) -> float:
    """When the first request like this one fits."""
    after_s = rooms_after_s(NOW_S, asked, mirrors_of(a=engine), 0)
    assert np.all(np.diff(after_s) >= 0.0)
    return float(min(after_s, default=np.inf))


def owing(*prompts: int, due_in_s: float = 5.0) -> EngineBuilder:
    """An engine that has promised these prompts."""
    engine = loaded(0)
    for tokens in prompts:
        engine.prefilling(tokens, 0, due_in_s=due_in_s)
    return engine


def test_room_opens_when_owed_prompts_are_computed() -> None:
    asked = request(1500, due_in_s=1.0, reject_when_full=True)
    rate = float(mirrors_of(a=loaded(0)).arrays.idle_rate[0])
    for count in (2, 4):
        needs_s = 8000 * count / rate
        found_s = first_room_s(owing(*[8000] * count, due_in_s=1.2 * needs_s), asked)
        assert 0.5 * needs_s <= found_s <= 1.2 * needs_s + 0.5
    assert first_room_s(loaded(0), asked) == LEAST_STEP_S
    assert first_room_s(loaded(0), request(9000, due_in_s=0.01)) == np.inf, "it never fits"


def test_room_opens_when_decodes_end_at_the_pace_that_they_really_have() -> None:
    """More decodes than the engine can carry: room opens only when some end."""
    full = loaded(800, total_blocks=400_000)
    short, long = (first_room_s(full, request(200, max_tokens=tokens)) for tokens in (20, 200))
    assert 0.0 < short < long < np.inf
    hinted = first_room_s(full, request(200, max_tokens=200, hint_tokens=20))
    assert hinted == short, "a client's forecast of its answer is used"
    memory = loaded(20, total_blocks=500)
    assert LEAST_STEP_S < first_room_s(memory, request(4000, due_in_s=60.0)) < np.inf, "their KV is free then"


def test_a_seat_opens_each_time_that_a_decode_ends() -> None:
    engine = EngineBuilder(max_num_seqs=2)
    for _ in range(2):
        engine.decode(output_tokens=5, max_tokens=20)
    after_s = rooms_after_s(NOW_S, request(100, due_in_s=1.0, max_tokens=20), mirrors_of(a=engine), 0)
    assert after_s[0] > 0.0
    assert len(after_s) > 8, "those that take the two seats leave them too"


def test_each_refusal_is_told_a_later_time_than_the_one_before() -> None:
    mirrors, asked = mirrors_of(a=owing(*[8000] * 3)), request(4000, reject_when_full=True)
    times = RetryTimes(mirrors)
    told = [times.next_s(NOW_S, asked, 1.0) for _ in range(20)]
    assert told == sorted(told) and SOONEST_S <= told[0] <= 5.0 and told[-1] > told[0]
    # As fast as the engine computes prompts like it; attention makes them dearer than their tokens.
    gap_s = 4000 / float(mirrors.arrays.idle_rate[0])
    assert gap_s <= (told[-1] - told[4]) / 15 <= 2.5 * gap_s
    assert times.next_s(NOW_S + told[-1] + 1.0, asked, 1000.0) < told[-1], "those that were told are gone by then"
    assert max(RetryTimes(mirrors).next_s(NOW_S, request(9000, due_in_s=0.01), 1.0) for _ in range(3)) == LATEST_S


def test_a_fleet_has_the_rooms_of_all_its_replicas() -> None:
    engines = {f"r{k}": owing(*[8000] * 3) for k in range(12)}
    asked = request(4000, reject_when_full=True)
    alone, fleet = RetryTimes(mirrors_of(a=engines["r0"])), RetryTimes(mirrors_of(**engines))
    for _ in range(24):
        last = alone.next_s(NOW_S, asked, 1.0), fleet.next_s(NOW_S, asked, 1.0)
    assert last[1] < 0.5 * last[0]


def test_stale_replicas_are_not_counted_on() -> None:
    mirrors, asked = mirrors_of(a=loaded(10)), request(200)
    assert RetryTimes(mirrors).next_s(NOW_S, asked, 1.0) == SOONEST_S
    assert RetryTimes(mirrors).next_s(NOW_S + 100.0, asked, 1.0) == UNKNOWN_S
    assert RetryTimes(Mirrors()).next_s(NOW_S, asked, 1.0) == UNKNOWN_S


def test_headroom_shrinks_with_load_and_reserves_nothing() -> None:
    idle, busy = published(loaded(0, total_blocks=1000)), published(loaded(40, total_blocks=1000))
    first = headroom(idle, request(), NOW_S, most=200)
    assert 200 > first > headroom(busy, request(), NOW_S, most=200) > 0
    assert headroom(idle, request(), NOW_S, most=200) == first
    assert headroom(idle, request(), NOW_S) == MOST
    assert headroom(idle, request(9000, due_in_s=0.1), NOW_S) == 0


def test_the_longest_prompt_is_the_longest_that_routing_says_yes_to() -> None:
    for engine in (loaded(0), loaded(40), owing(1500, 1500)):
        publication, asked = published(engine), request(due_in_s=2.0)
        longest = headroom_prefill_tokens(publication, asked, NOW_S)
        assert longest > 500
        assert headroom(publication, replace(asked, prompt_tokens=longest), NOW_S) > 0
        assert headroom(publication, replace(asked, prompt_tokens=round(1.05 * longest)), NOW_S) == 0
    assert headroom_prefill_tokens(published(loaded(0)), request(due_in_s=0.001), NOW_S) == 0


def test_where_kv_is_short_it_bounds_the_longest_prompt() -> None:
    asked = request(due_in_s=30.0)
    found = [headroom_prefill_tokens(published(loaded(0, total_blocks=blocks)), asked, NOW_S) for blocks in (200, 400)]
    assert 0 < found[0] < 200 * 16 and found[0] < found[1] < 400 * 16


def test_one_more_stream_goes_at_the_pace_of_the_batch_that_it_joins() -> None:
    idle, busy = (next_tpot_s(published(loaded(count))) for count in (0, 60))
    assert 0.0 < OPT_13B_A100.zero_load_s(1) <= idle < busy


def test_the_room_of_a_fleet_is_all_headroom_and_the_best_times() -> None:
    assert together([Room(3.0, 0.5, 0.04), Room(4.0, 0.2, 0.05)]) == Room(7.0, 0.2, 0.04)


def test_a_replica_is_as_full_as_its_time_or_its_kv() -> None:
    idle, busy_one = published(loaded(0, total_blocks=4000)), published(loaded(30, total_blocks=4000))
    rate = float(mirrors_of(a=loaded(0)).arrays.idle_rate[0])
    assert busy(idle, 0.0) == pytest.approx(0.0, abs=0.01)
    assert busy(idle, 0.5 * rate) == pytest.approx(0.5)
    assert busy(busy_one, 0.5 * rate) > 0.5, "decodes leave less"
    assert busy(busy_one, 100.0 * rate) == MOST_BUSY
    little_kv = published(loaded(30, total_blocks=400))
    of_kv = 1.0 - float(little_kv.memory_left.min()) / 400
    assert busy(little_kv, 0.0) == pytest.approx(of_kv) and of_kv > 0.3


def test_whoever_asked_in_vain_makes_a_replica_more_than_full() -> None:
    publication = published(loaded(30, total_blocks=4000))
    assert promises(publication) == 30
    assert fullness(publication, 0.0, 0) == busy(publication, 0.0) < 0.7
    assert fullness(publication, 0.0, 15) == pytest.approx(1.5)
    assert fullness(published(loaded(0)), 0.0, 2) == pytest.approx(2.0)


def test_a_token_of_a_long_prompt_costs_more() -> None:
    publication = published(loaded(0))
    assert 1.0 < with_attention(publication, 1000) < with_attention(publication, 8000) < 2.0


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
