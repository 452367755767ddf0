"""Pairs of a prefill and a decode replica: who is asked for what, what is reserved, and which replica changes role."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slos_serve.core.verdict import Verdict, Why
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.pairs import SETTLED_S, Role, Roles, hand_over_s, route_answer, route_pair
from tests.builders import EngineBuilder
from tests.unit.routing.fleet import NOW_S, loaded, mirrors_of, published, request

TRANSFER_S = 0.05


def _full_of_decodes() -> EngineBuilder:
    """No room for one more decode, though prompts that end at once would fit."""
    return loaded(600, total_blocks=40_000)


def _full_of_prompts() -> EngineBuilder:
    """Owes prompts, all begun, that take all of the next two seconds; nothing decodes."""
    engine = loaded(0)
    for _ in range(4):
        engine.prefilling(3500, 10, due_in_s=2.0)
    return engine


def _fleet(**engines: EngineBuilder) -> tuple[Mirrors, Roles]:
    return mirrors_of(**engines), Roles(engines, 1)


def test_a_pair_is_one_of_each_role_and_both_count_the_request() -> None:
    mirrors, roles = _fleet(p=loaded(0), d=loaded(5))
    decision = route_pair(NOW_S, request(1000, due_in_s=2.0), mirrors, roles, TRANSFER_S)
    assert (decision.prefill, decision.decode) == ("p", "d")
    assert (decision.verdict, decision.reason) == (Verdict.ADMITTED, Why.FITS)
    assert mirrors.in_flight("p") == mirrors.in_flight("d") == 1
    owed = mirrors.arrays.cost_tokens
    # The prompt is the prefill side's; the decode side computes its last token only.
    assert owed[mirrors.position("p"), 0] >= 1000 and owed[mirrors.position("d"), 0] < 50


def test_the_prompt_is_due_earlier_by_the_transfer_and_the_decode_replicas_first_steps() -> None:
    due_s = {}
    for transfer_s in (0.0, 0.5):
        mirrors, roles = _fleet(p=loaded(0), d=loaded(5))
        asked = request(1000, due_in_s=2.0)
        expected = asked.ttft_due_s - hand_over_s(mirrors, mirrors.position("d"), roles, transfer_s)
        due_s[transfer_s] = route_pair(NOW_S, asked, mirrors, roles, transfer_s).prompt_due_s
        assert due_s[transfer_s] == pytest.approx(expected)
    assert due_s[0.0] - due_s[0.5] == pytest.approx(0.5)
    assert due_s[0.0] < NOW_S + 2.0


def test_the_deadline_of_a_whole_answer_makes_the_prompt_due_too() -> None:
    mirrors, roles = _fleet(p=loaded(0), d=loaded(5))
    asked = replace(request(1000, due_in_s=2.0), ttft_due_s=float("inf"), answer_due_s=NOW_S + 20.0)
    decision = route_pair(NOW_S, asked, mirrors, roles, TRANSFER_S)
    assert decision.verdict is Verdict.ADMITTED
    assert NOW_S < decision.prompt_due_s < NOW_S + 20.0


def test_a_pace_alone_makes_the_prompt_due_as_planners_imply_it() -> None:
    mirrors, roles = _fleet(p=loaded(0), d=loaded(5))
    asked = replace(request(1000), ttft_due_s=float("inf"))
    decision = route_pair(NOW_S, asked, mirrors, roles, TRANSFER_S)
    assert decision.verdict is Verdict.ADMITTED
    assert NOW_S + 25.0 < decision.prompt_due_s < NOW_S + 30.0


@pytest.mark.parametrize("full", ["p", "d"])
def test_where_one_side_is_full_nothing_is_promised_and_nothing_reserved_at_the_decode_replica(full: str) -> None:
    engines = {"p": loaded(0), "d": loaded(5)}
    engines[full] = _full_of_prompts() if full == "p" else _full_of_decodes()
    mirrors, roles = _fleet(**engines)
    decision = route_pair(NOW_S, request(1000, due_in_s=0.8), mirrors, roles, TRANSFER_S)
    assert (decision.prefill, decision.decode) == ("p", None)
    assert (decision.verdict, decision.reason) == (Verdict.BEST_EFFORT, Why.ALL_FULL)
    assert mirrors.in_flight("d") == 0
    refused = route_pair(NOW_S, replace(request(1000, due_in_s=0.8), reject_when_full=True), mirrors, roles, TRANSFER_S)
    assert refused.verdict is Verdict.REJECTED and refused.prefill is None


def test_an_answer_is_asked_for_again_when_its_prompt_is_there() -> None:
    mirrors, roles = _fleet(p=loaded(0), d=loaded(5), e=_full_of_decodes())
    assert route_answer(NOW_S, request(1000, due_in_s=0.8), mirrors, roles) == "d"
    assert mirrors.in_flight("d") == 1
    # Too late for everybody: it goes where fewest are like it, without a promise.
    assert route_answer(NOW_S, request(1000, due_in_s=-0.1), mirrors, roles) in ("d", "e")


def test_a_reservation_stays_until_the_replica_has_been_given_the_request() -> None:
    engine = loaded(5)
    mirrors, roles = _fleet(p=loaded(0), d=engine)
    route_pair(NOW_S, replace(request(1000, due_in_s=2.0), ticket=7), mirrors, roles, TRANSFER_S)
    for sequence, tickets, left in ((1, (), 1), (2, (7,), 0)):
        newer = replace(published(engine, "d"), sequence=10 + sequence, seen_until_s=NOW_S + sequence)
        assert mirrors.update(newer, tickets=tickets)
        assert mirrors.in_flight("d") == left


def test_roles_stay_unless_they_move() -> None:
    engines = {"p": _full_of_prompts(), "d": loaded(5), "e": loaded(5)}
    mirrors, roles = _fleet(**engines)
    assert route_pair(NOW_S, request(1000, due_in_s=0.8), mirrors, roles, TRANSFER_S).verdict is Verdict.BEST_EFFORT
    assert roles.of(Role.PREFILL) == ["p"] and roles.moves == 0


def test_a_decode_replica_takes_over_prompts_that_no_prefill_replica_can_take() -> None:
    engines = {"p": _full_of_prompts(), "d": loaded(5), "e": loaded(5)}
    mirrors, roles = mirrors_of(**engines), Roles(engines, 1, moving=True)
    decision = route_pair(NOW_S, request(1000, due_in_s=0.8), mirrors, roles, TRANSFER_S)
    assert decision.verdict is Verdict.ADMITTED
    assert decision.prefill in ("d", "e") and decision.prefill != decision.decode
    assert set(roles.of(Role.PREFILL)) == {"p", decision.prefill} and roles.moves == 1
    # One decode replica is left: it stays, however full the others are.
    assert roles.may_move_to(Role.PREFILL, NOW_S + 100.0) == []
    # The one that moved stays for a while, the other may go back.
    assert roles.may_move_to(Role.DECODE, NOW_S) == ["p"]
    assert set(roles.may_move_to(Role.DECODE, NOW_S + SETTLED_S)) == {"p", decision.prefill}


def test_a_prefill_replica_takes_over_answers_that_no_decode_replica_can_take() -> None:
    engines = {"p": loaded(0), "q": loaded(0), "d": _full_of_decodes()}
    mirrors, roles = mirrors_of(**engines), Roles(engines, 2, moving=True)
    decision = route_pair(NOW_S, request(1000, due_in_s=2.0), mirrors, roles, TRANSFER_S)
    assert decision.verdict is Verdict.ADMITTED
    assert {decision.prefill, decision.decode} == {"p", "q"}
    assert roles.of(Role.PREFILL) == [decision.prefill]


def test_when_the_last_of_a_role_dies_another_takes_it() -> None:
    roles = Roles(["p", "d", "e"], 1)
    roles.remove("p")
    assert roles.of(Role.PREFILL) == ["d"] and roles.of(Role.DECODE) == ["e"]
