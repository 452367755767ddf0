"""What an ingress makes of a request: class, promises, lengths."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.verdict import Verdict, Why
from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.perf.tasks import MOST_LATE_WEIGHT, TaskKey
from slos_serve.ray_serve.prompts import PromptCounter
from slos_serve.ray_serve.ticket_office import TicketOffice, session_of
from slos_serve.routing.router import RoutingDecision
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.handed import HANDED_KEY, handed_call, with_told
from tests.builders import OPT_13B_A100

CLASSES = """
default_class: chat
classes:
  chat: {ttft_slowdown: 5, tpot_ms: 100}
  tool: {ttft_ms: 500, tpot_ms: 50, weight: 2, when_full: reject, last_round: chat}
  batch: {}
  patient: {ttft_ms: 100, tpot_ms: 50, weight: 2, otherwise: [{ttft_ms: 900, tpot_ms: 200}, {e2e_ms: 9000}]}
  coder: {task_ms: 60000, task_calls: 3, weight: 2}
"""


class Words:
    """A tokenizer of words."""

    def encode(self, text: str) -> list[str]:
        return text.split()

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> list[str]:
        return ["<start>", *(word for message in messages for word in message["content"].split())]


@pytest.fixture
def office(tmp_path: Path) -> TicketOffice:
    profile = Profile("m", "d", "vllm", "1", "now", "bf16", 1, 64_000, 16, 2048, OPT_13B_A100)
    save_profile(profile, tmp_path / "p.json")
    (tmp_path / "c.yaml").write_text(CLASSES, encoding="utf-8")
    settings = PluginConfig(classes_path=tmp_path / "c.yaml", profile_path=tmp_path / "p.json", ttft_margin_ms=10.0)
    return TicketOffice(settings, PromptCounter(Words()), max_model_len=100, clock_s=lambda: 7.0)


def body(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"prompt": "one two three", "vllm_xargs": None, **given})


def test_the_default_class_and_a_slowdown(office: TicketOffice) -> None:
    ticket = office.ticket(body())
    asked = ticket.asked
    assert (ticket.slo_class, asked.class_index, asked.prompt_tokens, asked.max_tokens) == ("chat", 0, 3, 97)
    assert asked.arrival_s == 7.0
    assert asked.ttft_due_s == pytest.approx(7.0 - 0.01 + max(5 * OPT_13B_A100.zero_load_s(3), 0.2))
    assert asked.tpot_s == 0.1 and not asked.reject_when_full


def test_a_promise_that_was_told_binds_the_replica_that_was_to_keep_it(office: TicketOffice) -> None:
    ticket = office.ticket(body())
    assert ticket.asked.binding and ticket.told_at("a") is None, "nobody has decided yet"
    for verdict in (Verdict.ADMITTED, Verdict.BEST_EFFORT, Verdict.NO_SLO):
        ticket.decision = RoutingDecision("a", verdict, Why.FITS)
        assert ticket.told_at("a") == (0 if verdict is Verdict.ADMITTED else None) and ticket.told_at("b") is None
    ticket.decision = RoutingDecision("a", Verdict.ADMITTED, Why.FITS)
    copied = pickle.loads(pickle.dumps(ticket))
    assert copied.told_at("a") == 0, "the replica's copy says so too"
    ticket.again()
    assert ticket.told_at("a") is None


def test_what_a_client_says_it_was_told_never_arrives() -> None:
    assert with_told(None, None) is None
    assert with_told({"slo_told": 1, "slo_class": "chat"}, None) == {"slo_class": "chat"}
    assert with_told({"slo_told": 1, "slo_class": "chat"}, 0) == {"slo_told": 0, "slo_class": "chat"}
    assert with_told(None, 0) == {"slo_told": 0}


def test_a_class_that_is_rejected_when_full_and_a_hint(office: TicketOffice) -> None:
    xargs = {"slo_class": "tool", "slo_tpot_ms": 70, "slo_expected_tokens": 9, "session_id": "s"}
    ticket = office.ticket(body(vllm_xargs=xargs, max_tokens=12))
    asked = ticket.asked
    assert (asked.class_index, asked.weight, asked.hint_tokens, asked.max_tokens) == (1, 2.0, 9, 12)
    assert asked.reject_when_full and asked.tpot_s == 0.07
    assert (ticket.session, ticket.last_round) == ("s", False)


def test_the_last_round_gets_the_class_that_its_class_names(office: TicketOffice) -> None:
    ticket = office.ticket(body(vllm_xargs={"slo_class": "tool", "slo_last_round": 1}), session="h")
    assert (ticket.slo_class, ticket.session, ticket.last_round) == ("chat", "h", True)
    assert not ticket.asked.reject_when_full


@pytest.mark.parametrize(("name", "index"), [("batch", 6), ("none", 6)])
def test_no_promise(office: TicketOffice, name: str, index: int) -> None:
    asked = office.ticket(body(vllm_xargs={"slo_class": name})).asked
    assert not asked.has_slo and asked.class_index == index


def test_custom_numbers_have_an_index_of_their_own(office: TicketOffice) -> None:
    ticket = office.ticket(body(vllm_xargs={"slo_class": "none", "slo_ttft_ms": 900}))
    assert (ticket.slo_class, ticket.asked.class_index, ticket.asked.tpot_s) == ("custom", 5, math.inf)


def test_an_unknown_class_is_an_error(office: TicketOffice) -> None:
    with pytest.raises(InvalidFieldError, match="slo_class"):
        office.ticket(body(vllm_xargs={"slo_class": "gold"}))


def test_the_session_header() -> None:
    assert session_of({"x-session-id": "a"}) == "a"
    assert session_of({}) is None
    assert session_of({"x-session-id": "a" * 256}) == "a" * 256
    assert session_of({"x-session-id": "a" * 257}) is None, "as in the body"


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({"prompt": "a b"}, 2),
        ({"prompt": [1, 2, 3, 4]}, 4),
        ({"prompt": ["a b", "c"]}, 3),
        ({"prompt": [[1, 2], [3]]}, 3),
        ({"prompt": None}, 1),
        ({"messages": [{"role": "user", "content": "a b c"}]}, 4),
    ],
)
def test_counts_prompt_tokens(given: dict[str, Any], tokens: int) -> None:
    assert PromptCounter(Words()).prompt_tokens(SimpleNamespace(**given)) == tokens


def test_estimates_without_a_tokenizer_and_when_it_fails() -> None:
    chat = SimpleNamespace(messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 400}]}])
    assert PromptCounter().prompt_tokens(chat) == 117
    failing = SimpleNamespace(encode=None, apply_chat_template=None)
    assert PromptCounter(failing).prompt_tokens(chat) == 117
    assert PromptCounter().prompt_tokens(SimpleNamespace(prompt="x" * 40)) == 11


def ended_with(verdict: Verdict) -> RoutingDecision:
    return RoutingDecision("a", verdict, Why.FITS)


def test_a_call_of_a_task_takes_its_due_time_along_and_the_task_has_one_book(office: TicketOffice) -> None:
    xargs = {"slo_class": "coder", "session_id": "s", HANDED_KEY: "0.1 0.1 4"}
    for number in range(3):
        sent = body(vllm_xargs={**xargs, "slo_last_round": int(number == 2)})
        ticket = office.ticket(sent, arrival_s=10.0 * number)
        assert ticket.call is not None
        assert (ticket.call.number, ticket.call.task_due_s) == (number + 1, 60.0)
        left_s = 60.0 - 10.0 * number
        assert ticket.asked.answer_due_s == pytest.approx(10.0 * number + left_s / (3 - number) - 0.01)
        assert ticket.asked.weight == 2.0
        taken = handed_call(sent.vllm_xargs, TaskKey("", "s"), 500.0)
        assert taken is not None
        handed = [taken.due_s - 500.0, taken.task_due_s - 500.0, taken.weight]
        assert handed == pytest.approx([left_s / (3 - number), left_s, 1.0])
        assert office.tasks.take_ended() == []
        ticket.decision, ticket.output_tokens = ended_with(Verdict.ADMITTED), 5
        office.tasks.left(ticket, 10.0 * number + 1.0, finished=True)
    (ended,) = office.tasks.take_ended()
    assert (ended.calls, ended.kept, ended.promised, ended.spent_s) == (3, True, True, 21.0)
    assert office.class_name(ended.class_index) == "coder"


def test_a_client_that_hands_over_a_due_time_itself_is_not_believed(office: TicketOffice) -> None:
    sent = body(vllm_xargs={"slo_class": "chat", HANDED_KEY: "0.1 0.1 4"})
    assert office.ticket(sent).call is None
    assert sent.vllm_xargs == {"slo_class": "chat"}
    for value in ("", "1 2", "nan 1 1", "1 2 3 4", 5, None):
        assert handed_call({HANDED_KEY: value}, TaskKey("", "s"), 0.0) is None
    bounded = handed_call({HANDED_KEY: "1 2 1e9"}, TaskKey("", "s"), 0.0)
    assert bounded is not None
    assert bounded.weight == MOST_LATE_WEIGHT


def test_a_refused_call_of_a_task_and_one_that_was_lost(office: TicketOffice) -> None:
    xargs = {"slo_class": "coder", "session_id": "s"}
    office.tasks.refused(office.ticket(body(vllm_xargs=xargs), arrival_s=0.0))
    first = office.ticket(body(vllm_xargs=xargs), arrival_s=5.0)
    assert first.call is not None
    assert (first.call.number, first.call.task_due_s) == (1, 65.0)
    office.tasks.left(first, 6.0, finished=False)
    again = office.ticket(body(vllm_xargs={**xargs, "slo_last_round": 1}), arrival_s=7.0)
    assert again.call is not None
    assert again.call.number == 2
    office.tasks.left(again, 8.0, finished=True)
    (ended,) = office.tasks.take_ended()
    assert (ended.kept, ended.promised) == (True, False)


def test_weaker_promises_go_along_and_the_one_that_was_given_is_told(office: TicketOffice) -> None:
    ticket = office.ticket(body(vllm_xargs={"slo_class": "patient"}))
    several = (ticket.asked, *ticket.weaker)
    assert [round(one.ttft_due_s - 7.0, 3) for one in several] == [0.09, 0.89, math.inf]
    assert [one.tpot_s for one in several] == [0.05, 0.2, math.inf]
    assert [round(one.answer_due_s - 7.0, 3) for one in several] == [math.inf, math.inf, 8.99]
    assert [one.weight for one in several] == pytest.approx([2.0, 0.2, 0.2])
    assert len({one.ticket for one in several}) == 1 and all(one.binding for one in several)
    ticket.decision, ticket.rank = RoutingDecision("a", Verdict.SECOND_BEST, Why.FITS), 1
    assert pickle.loads(pickle.dumps(ticket)).told_at("a") == 1 and ticket.told_at("b") is None
    told = ticket.told()
    assert (told.rank, round(told.target_ttft_s, 6), told.target_tpot_s) == (1, 0.9, 0.2)
    ticket.again()
    assert ticket.rank == 0 and ticket.told_at("a") is None
