"""What a router tells clients: promises, weaker ones, targets and forecasts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from slos_serve.core.verdict import Verdict, Why
from slos_serve.ray_serve.answers import answer_headers
from slos_serve.ray_serve.dispatch import Dispatcher
from slos_serve.ray_serve.ticket import Ticket
from tests.builders import EngineBuilder
from tests.unit.ray_serve.routers import Clock, Postman, ticket, two_routers
from tests.unit.routing.fleet import loaded


def full(prompts: int) -> EngineBuilder:
    """An engine that owes so many long prompts soon."""
    engine = loaded(0)
    for _ in range(prompts):
        engine.wait(1500, due_in_s=1.0)
    return engine


def test_whoever_is_promised_nothing_is_told_when_it_begins(dispatcher: Dispatcher, postman: Postman) -> None:
    """Each after those that were sent there before it; whoever is promised something is told that instead."""
    dispatcher.set_replicas({"a": "tcp://a"})
    postman.bring("a", full(8))
    several = [ticket(3000) for _ in range(4)]
    for each in several:
        assert dispatcher.decide(each).verdict is Verdict.BEST_EFFORT
    starts = [each.start_s for each in several]
    assert all(0.5 < start < 30.0 for start in starts)
    assert starts == sorted(starts) and len(set(starts)) == 4
    assert several[0].ttft_s == several[0].tpot_s == math.inf
    postman.bring("a", loaded(0), at_s=0.1)
    fits = ticket(200)
    assert dispatcher.decide(fits).verdict is Verdict.ADMITTED
    assert fits.start_s == math.inf and 0.0 < fits.ttft_s < 1.0 and 0.0 < fits.tpot_s <= 0.1


def test_a_request_that_asks_for_nothing_is_told_its_start_too(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", full(8))
    dispatcher.set_replicas({"a": "tcp://a"})
    asked = Ticket(replace(ticket(3000).asked, ttft_due_s=math.inf, tpot_s=math.inf))
    assert dispatcher.decide(asked).verdict is Verdict.NO_SLO
    assert 0.5 < asked.start_s < 30.0


def test_before_a_replica_has_published_nothing_is_forecast(dispatcher: Dispatcher) -> None:
    asked = ticket()
    assert dispatcher.decide(asked).reason is Why.NO_STATE
    assert asked.ttft_s == asked.tpot_s == asked.start_s == math.inf


def test_the_forecast_is_of_the_replica_that_serves(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", full(8))
    postman.bring("b", loaded(0))
    asked = ticket(3000, due_in_s=2.0)
    assert dispatcher.decide(asked).replica == "b"
    assert asked.start_s == math.inf > asked.ttft_s
    dispatcher.routed(asked, "a")
    assert asked.ttft_s == math.inf and 0.5 < asked.start_s < 30.0


def test_a_promise_of_another_routers_replica_is_told_as_a_start(clock: Clock) -> None:
    router = two_routers(clock, ("me", "you"))["me"]
    for _ in range(80):
        asked = ticket(400)
        if router.decide(asked).reason is Why.FITS_ELSEWHERE:
            assert asked.ttft_s == math.inf and 0.0 < asked.start_s <= 1.0
            return
    raise AssertionError("nothing fits elsewhere")


def test_a_fault_of_the_forecast_costs_no_request(
    dispatcher: Dispatcher, postman: Postman, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("slos_serve.ray_serve.dispatch.predicted", lambda *_, **__: 1 / 0)
    postman.bring("a", loaded(0))
    asked = ticket()
    assert dispatcher.decide(asked).verdict is Verdict.ADMITTED
    assert asked.ttft_s == asked.start_s == math.inf and "failed to forecast" in caplog.text


def with_weaker(asked: Ticket, due_in_s: float) -> Ticket:
    """The same request, that may have its first token later instead."""
    later = replace(asked.asked, ttft_due_s=asked.asked.arrival_s + due_in_s, weight=0.1)
    return Ticket(asked.asked, weaker=(later,), slo_class="chat")


def test_who_cannot_have_the_first_promise_is_given_the_next(dispatcher: Dispatcher, postman: Postman) -> None:
    """In the same decision, and the mirror counts only that one."""
    dispatcher.set_replicas({"a": "tcp://a"})
    postman.bring("a", full(8))
    asked = with_weaker(ticket(3000), 60.0)
    decision = dispatcher.decide(asked)
    assert (decision.replica, decision.verdict, decision.reason) == ("a", Verdict.SECOND_BEST, Why.FITS)
    assert asked.rank == 1 and asked.told_at("a") == 1 and 1.0 < asked.ttft_s < 60.0 and asked.start_s == math.inf
    assert dispatcher.mirrors.in_flight("a") == 1
    assert dispatcher.decisions == {(Verdict.SECOND_BEST, Why.FITS): 1}
    headers = answer_headers(asked)
    assert (headers["x-slo-verdict"], headers["x-slo-rank"], headers["x-slo-target-ttft-ms"]) == (
        "second-best",
        "1",
        "60000",
    )
    fits = with_weaker(ticket(200), 60.0)
    postman.bring("a", loaded(0), at_s=0.1)
    assert dispatcher.decide(fits).verdict is Verdict.ADMITTED and fits.rank == 0


@pytest.mark.parametrize("reject", [False, True])
def test_who_can_have_no_promise_is_served_or_refused_as_its_class_says(
    dispatcher: Dispatcher, postman: Postman, reject: bool
) -> None:
    dispatcher.set_replicas({"a": "tcp://a"})
    postman.bring("a", full(8))
    asked = with_weaker(ticket(3000, reject_when_full=reject), 1.1)
    verdict = dispatcher.decide(asked).verdict
    assert verdict is (Verdict.REJECTED if reject else Verdict.BEST_EFFORT) and asked.rank == 0
    assert dispatcher.mirrors.in_flight("a") == (0 if reject else 1)
    assert math.isfinite(asked.retry_after_s) is reject


def test_a_weaker_promise_here_comes_before_an_uncertain_one_elsewhere(clock: Clock) -> None:
    router = two_routers(clock, ("me", "you"))["me"]
    made = []
    for _ in range(80):
        asked = with_weaker(ticket(400), 600.0)
        made.append(router.decide(asked))
    assert {decision.verdict for decision in made} == {Verdict.ADMITTED, Verdict.SECOND_BEST}
    assert {decision.replica for decision in made} == {"a"} and router.mirrors.in_flight("b") == 0


def test_headers_hold_targets_and_what_is_expected(dispatcher: Dispatcher, postman: Postman) -> None:
    postman.bring("a", full(8))
    dispatcher.set_replicas({"a": "tcp://a"})
    asked = ticket(3000)
    asked.ttft_margin_s = 0.5
    dispatcher.decide(asked)
    headers = answer_headers(asked)
    assert (headers["x-slo-verdict"], headers["x-slo-target-ttft-ms"], headers["x-slo-target-tpot-ms"]) == (
        "best-effort",
        "1500",
        "100",
    )
    assert headers["x-slo-predicted-start-ms"] == f"{asked.start_s * 1e3:.0f}"
    assert "x-slo-predicted-ttft-ms" not in headers and "x-slo-target-e2e-ms" not in headers
    postman.bring("a", loaded(0), at_s=0.1)
    dispatcher.decide(asked)
    headers = answer_headers(asked)
    assert headers["x-slo-verdict"] == "admitted" and "x-slo-predicted-start-ms" not in headers
    assert {"x-slo-predicted-ttft-ms", "x-slo-predicted-tpot-ms"} <= headers.keys()
