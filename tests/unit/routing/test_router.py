"""Orders of asking, what happens where nobody attains, bursts between publications, stale replicas, prefixes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.request import share_of
from slos_serve.core.verdict import Verdict, Why
from slos_serve.routing.mirrors import LOST_AFTER_S, Mirrors
from slos_serve.routing.router import RouterSettings, route, verdicts
from slos_serve.routing.settings import Order
from tests.unit.routing.fleet import NOW_S, loaded, mirrors_of, published, request

PACK, SPREAD = RouterSettings(Order.PACK), RouterSettings(Order.SPREAD)


def test_pack_asks_the_busiest_first_and_spread_the_least_busy() -> None:
    engines = {"idle": loaded(0), "some": loaded(20), "many": loaded(40)}
    assert route(NOW_S, request(), mirrors_of(**engines), PACK).replica == "many"
    assert route(NOW_S, request(), mirrors_of(**engines), SPREAD).replica == "idle"


def test_pack_goes_on_to_the_next_when_the_busiest_cannot() -> None:
    engines = {"idle": loaded(0), "full": loaded(600, total_blocks=40_000)}
    decision = route(NOW_S, request(), mirrors_of(**engines), PACK)
    assert (decision.replica, decision.verdict, decision.reason) == ("idle", Verdict.ADMITTED, Why.FITS)


def test_declined_everywhere_goes_unpromised_to_the_fewest_of_its_kind() -> None:
    crowded = loaded(2)
    for _ in range(3):
        crowded.best_effort()
    mirrors = mirrors_of(crowded=crowded, free=loaded(5))
    hopeless = request(9000, due_in_s=0.3)
    decision = route(NOW_S, hopeless, mirrors, SPREAD)
    assert (decision.replica, decision.verdict, decision.reason) == ("free", Verdict.BEST_EFFORT, Why.ALL_FULL)
    # Each one sent there counts, so the fifth goes to the other one.
    sent = [route(NOW_S, hopeless, mirrors, SPREAD).replica for _ in range(4)]
    assert sent == ["free", "free", "crowded", "free"]


def test_a_short_request_takes_the_place_of_a_long_one_that_has_not_begun() -> None:
    full = loaded(0)
    full.wait(3500, due_in_s=0.6)
    mirrors = mirrors_of(a=full)
    longer, shorter = request(3800, due_in_s=0.65), request(1000, due_in_s=0.5)
    assert route(NOW_S, longer, mirrors).verdict is Verdict.BEST_EFFORT
    decision = route(NOW_S, shorter, mirrors)
    assert (decision.verdict, decision.reason) == (Verdict.ADMITTED, Why.FITS_INSTEAD)
    # The long one waits unpromised now, so there is room for more.
    assert mirrors.arrays.num_unpromised[0] == 2 and mirrors.arrays.num_owed[0] == 1
    assert route(NOW_S, shorter, mirrors).reason is Why.FITS


@pytest.mark.parametrize("change", ["begun", "heavier"])
def test_nothing_begun_and_nothing_worth_more_is_given_up(change: str) -> None:
    full = loaded(0)
    if change == "begun":
        full.prefilling(3500, 10, due_in_s=0.6)
    else:
        full.wait(3500, due_in_s=0.6, weight=2.0)
    assert route(NOW_S, request(1000, due_in_s=0.5), mirrors_of(a=full)).verdict is Verdict.BEST_EFFORT


def test_a_tenant_that_is_promised_too_little_takes_the_place_of_another() -> None:
    for class_index, tenant, verdict in ((0, 2, Verdict.ADMITTED), (0, 1, Verdict.BEST_EFFORT)):
        full = loaded(0)
        full.wait(3500, due_in_s=0.6)
        mirrors = Mirrors(["a"], num_classes=3)  # the replica knows two classes: it numbers shares in its own way
        given = replace(published(full), forecast_tokens=np.full(2, 50.0))
        mirrors.update(replace(given, boosted=np.array([share_of(0, 2, 2)]), boost=np.array([4.0])))
        asked = request(3800, due_in_s=0.65, class_index=class_index, share=share_of(class_index, 3, tenant))
        assert route(NOW_S, asked, mirrors).verdict is verdict


def test_a_promise_that_binds_gives_no_place_and_stays_when_times_turn_out_otherwise() -> None:
    for binding, answer in ((False, Why.FITS_INSTEAD), (True, Why.ALL_FULL)):
        mirrors = mirrors_of(a=loaded(0))
        told = route(NOW_S, request(3500, due_in_s=0.6, binding=binding, ticket=1), mirrors)
        assert told.verdict is Verdict.ADMITTED
        assert route(NOW_S, request(1000, due_in_s=0.5), mirrors).reason is answer
    crowded = loaded(0)
    crowded.prefilling(3500, 10, due_in_s=0.6)
    mirrors.update(published(crowded, "a", sequence=1), tickets=())
    assert int(mirrors.arrays.num_owed[0]) == 2, "the engine has it not yet, and is bound when it comes"


def test_one_that_has_not_begun_gives_its_memory_too() -> None:
    full = loaded(0, total_blocks=150)
    full.wait(1500, due_in_s=9.0)
    mirrors = mirrors_of(a=full)
    assert route(NOW_S, request(1600, due_in_s=9.0), mirrors).verdict is Verdict.BEST_EFFORT
    assert route(NOW_S, request(900, due_in_s=9.0), mirrors).reason is Why.FITS_INSTEAD
    assert mirrors.arrays.memory_left[0, 0] == 150 - -(-1000 // 16)


def test_a_class_may_prefer_rejection() -> None:
    mirrors = mirrors_of(a=loaded(0))
    decision = route(NOW_S, request(9000, due_in_s=0.3, reject_when_full=True), mirrors)
    assert (decision.replica, decision.verdict, decision.reason) == (None, Verdict.REJECTED, Why.ALL_FULL)
    assert mirrors.in_flight("a") == 0


def test_no_slo_is_best_effort_without_asking() -> None:
    decision = route(NOW_S, request(due_in_s=np.inf, tpot_s=np.inf), mirrors_of(a=loaded(0)))
    assert (decision.replica, decision.verdict, decision.reason) == ("a", Verdict.NO_SLO, Why.NO_SLO)


def test_a_session_that_missed_takes_no_promised_place() -> None:
    mirrors = mirrors_of(a=loaded(0))
    decision = route(NOW_S, request(missed=True), mirrors)
    assert (decision.verdict, decision.reason) == (Verdict.BEST_EFFORT, Why.SESSION_MISSED)
    assert verdicts(NOW_S, request(missed=True), mirrors) == {"a": False}
    assert mirrors.arrays.num_owed[0] == 0


def test_no_replica_rejects() -> None:
    assert route(NOW_S, request(), Mirrors()).reason is Why.NO_REPLICA


def test_a_burst_does_not_slip_through_between_two_publications() -> None:
    mirrors = mirrors_of(a=loaded(0), b=loaded(0))
    found = [route(NOW_S, request(1000, due_in_s=0.5), mirrors, PACK) for _ in range(40)]
    promised = Counter(one.replica for one in found if one.verdict is Verdict.ADMITTED)
    # At most 9,000 tokens a second for half a second.
    assert promised["a"] == promised["b"] and 2 <= promised["a"] <= 5
    assert found[-1].verdict is Verdict.BEST_EFFORT


def test_memory_of_what_is_in_flight_is_reserved() -> None:
    mirrors = mirrors_of(a=loaded(0, total_blocks=100))
    # 200 + 100 tokens are 19 blocks of 16.
    found = [route(NOW_S, request(due_in_s=20.0), mirrors).verdict for _ in range(6)]
    assert found == [Verdict.ADMITTED] * 5 + [Verdict.BEST_EFFORT]


def test_a_publication_that_lacks_what_was_sent_does_not_free_its_place() -> None:
    mirrors = mirrors_of(a=loaded(0, total_blocks=100))
    for _ in range(5):
        route(NOW_S + 0.05, request(due_in_s=20.0), mirrors)
    mirrors.update(published(loaded(0, total_blocks=100), sequence=1, time_s=NOW_S + 0.04))
    assert mirrors.in_flight("a") == 5
    assert route(NOW_S + 0.06, request(due_in_s=20.0), mirrors).verdict is Verdict.BEST_EFFORT
    mirrors.update(published(loaded(0, total_blocks=100), sequence=2, time_s=NOW_S + 0.07))
    assert mirrors.in_flight("a") == 0
    assert route(NOW_S + 0.08, request(due_in_s=20.0), mirrors).verdict is Verdict.ADMITTED


def test_requests_on_their_way_when_a_publication_was_made_stay_reserved() -> None:
    mirrors = Mirrors(["a"], transit_s=0.02)
    mirrors.update(published(loaded(0)))
    route(NOW_S + 0.05, request(), mirrors)
    mirrors.update(published(loaded(0), sequence=1, time_s=NOW_S + 0.06))
    assert mirrors.in_flight("a") == 1
    mirrors.update(published(loaded(0), sequence=2, time_s=NOW_S + 0.08))
    assert mirrors.in_flight("a") == 0


def test_a_request_stays_reserved_until_its_engine_names_it() -> None:
    """However slow its hand-over is: a replica whose process is busy would be promised to others meanwhile."""
    mirrors = Mirrors(["a"], transit_s=0.02)
    mirrors.update(published(loaded(0, total_blocks=100)), tickets=())
    for ticket in range(1, 6):
        route(NOW_S, request(due_in_s=20.0, ticket=ticket), mirrors)
    mirrors.update(published(loaded(0, total_blocks=100), sequence=1, time_s=NOW_S + 0.8), tickets={2, 77})
    assert mirrors.in_flight("a") == 4
    found = [route(NOW_S + 0.8, request(due_in_s=20.0), mirrors).verdict for _ in range(2)]
    assert found == [Verdict.ADMITTED, Verdict.BEST_EFFORT]
    far_s = NOW_S + LOST_AFTER_S + 1.0
    mirrors.update(published(loaded(0, total_blocks=100), sequence=2, time_s=far_s), tickets=())
    assert mirrors.in_flight("a") == 0, "it is lost"


def test_stale_and_silent_replicas_count_as_full() -> None:
    mirrors = mirrors_of(a=loaded(0), b=loaded(30))
    mirrors.add("silent")
    later = NOW_S + 1.2
    mirrors.update(published(loaded(30), "b", sequence=1, time_s=NOW_S + 1.0))
    asked = request(due_in_s=3.0)
    assert verdicts(later, asked, mirrors) == {"b": True}
    assert route(later, asked, mirrors, SPREAD).replica == "b"
    far = NOW_S + 60.0
    decision = route(far, request(due_in_s=70.0), mirrors, SPREAD)
    assert (decision.verdict, decision.reason) == (Verdict.BEST_EFFORT, Why.NO_STATE)
    # The unpromised go round, whatever is known of their replicas.
    assert {route(far, request(), mirrors).replica for _ in range(2)} | {decision.replica} == {"a", "b", "silent"}


def test_an_idle_replica_may_renew_its_publication() -> None:
    mirrors = mirrors_of(a=loaded(0))
    mirrors.renew("a", NOW_S + 5.0)
    assert route(NOW_S + 5.5, request(due_in_s=7.0), mirrors).verdict is Verdict.ADMITTED


def test_old_publications_and_strangers_are_ignored() -> None:
    mirrors = mirrors_of(a=loaded(0))
    assert not mirrors.update(published(loaded(9), sequence=0))
    assert not mirrors.update(published(loaded(9), "stranger", sequence=5))
    mirrors.restarted("a")
    assert mirrors.update(published(loaded(9), sequence=0))


def test_a_round_goes_where_its_prefix_is_while_that_replica_attains() -> None:
    asked = request(2000, due_in_s=0.35, cached={"home": 1900})
    decision = route(NOW_S, asked, mirrors_of(home=loaded(20), idle=loaded(0)))
    assert (decision.replica, decision.reason) == ("home", Why.FITS_AT_PREFIX)
    full = loaded(600, total_blocks=40_000)
    assert route(NOW_S, asked, mirrors_of(home=full, idle=loaded(0))).replica == "idle"


def test_cached_tokens_make_attainable_what_is_not_without() -> None:
    mirrors = mirrors_of(a=loaded(0), b=loaded(0))
    asked = request(8000, due_in_s=0.3, cached={"b": 7900})
    assert verdicts(NOW_S, asked, mirrors) == {"a": False, "b": True}
    assert route(NOW_S, asked, mirrors, PACK).replica == "b"


def test_a_replica_that_is_gone_gets_nothing_and_its_place_is_reused() -> None:
    mirrors = mirrors_of(a=loaded(0), b=loaded(3))
    mirrors.remove("a")
    assert "a" not in mirrors and len(mirrors) == 1
    assert route(NOW_S, request(), mirrors, SPREAD).replica == "b"
    mirrors.add("c")
    assert mirrors.position("c") == 0
    assert route(NOW_S, request(), mirrors, SPREAD).replica == "b"  # c has not published


def test_many_replicas_and_long_queues_grow_the_arrays() -> None:
    mirrors = mirrors_of(**{f"r{k}": loaded(0, total_blocks=40_000) for k in range(9)})
    found = [route(NOW_S, request(20, due_in_s=30.0, max_tokens=2), mirrors, PACK) for _ in range(150)]
    assert {one.verdict for one in found} == {Verdict.ADMITTED}
    assert max(Counter(one.replica for one in found).values()) > 64


def test_more_tiers_than_places_count_as_tighter_ones() -> None:
    mirrors = mirrors_of(a=loaded(1))
    for step in range(20):
        decision = route(NOW_S, request(20, tpot_s=0.3 - 0.01 * step), mirrors)
        assert decision.verdict is Verdict.ADMITTED
    assert mirrors.arrays.num_tiers[0] == mirrors.arrays.pace_s.shape[1]
    assert mirrors.arrays.in_tier[0].sum() == 21


def test_bound_is_checked() -> None:
    with pytest.raises(InvalidFieldError, match="stale_after_s"):
        RouterSettings(stale_after_s=0.0)


def test_room_that_is_given_back_can_be_promised_again() -> None:
    mirrors = mirrors_of(a=loaded(0))
    before = [part.copy() for part in mirrors.arrays]
    asked = request(3000, due_in_s=0.8)
    sent = []
    while route(NOW_S, replace(asked, reject_when_full=True), mirrors).verdict is Verdict.ADMITTED:
        sent.append(mirrors.newest("a"))
    assert sent
    mirrors.withdraw("a", sent[0])
    mirrors.withdraw("a", sent[0])
    mirrors.withdraw("unknown", sent[0])
    assert mirrors.in_flight("a") == len(sent) - 1
    assert route(NOW_S, asked, mirrors).verdict is Verdict.ADMITTED
    sent.append(mirrors.newest("a"))
    for each in sent[1:]:
        mirrors.withdraw("a", each)
    for was, now in zip(before, mirrors.arrays, strict=True):
        np.testing.assert_array_equal(was, now)


def test_room_at_a_replica_that_never_published_is_given_back_too() -> None:
    mirrors = Mirrors(["a"])
    route(NOW_S, request(), mirrors)
    assert mirrors.arrays.num_unpromised[0] == 1
    mirrors.withdraw("a", mirrors.newest("a"))
    assert mirrors.arrays.num_unpromised[0] == 0 and mirrors.in_flight("a") == 0
