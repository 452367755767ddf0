"""The SLO fields of a request: read, bounded, and refused by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.core.tasks import TaskPromise, task_of, with_task
from slos_serve.vllm_plugin.slo_args import SloArgs, from_extra_args, header_args

CLASSES = ClassSet({"chat": single_stage("chat", SLO(ttft_ms=2000.0, tpot_ms=100.0))}, default="chat")


def test_reads_every_key_and_leaves_others_alone() -> None:
    args = from_extra_args(
        {
            "slo_class": "chat",
            "slo_ttft_ms": 500,
            "slo_tpot_ms": 20.5,
            "slo_e2e_ms": 9000,
            "slo_expected_tokens": 128,
            "slo_last_round": 1,
            "session_id": "s-1",
            "kv_transfer_params": {"anything": None},
        }
    )
    assert args == SloArgs("chat", 500.0, 20.5, 9000.0, 128, "s-1", last_round=True)


@pytest.mark.parametrize("empty", [None, {}, {"other": 1}])
def test_nothing_asked_is_nothing_given(empty: dict[str, object] | None) -> None:
    assert from_extra_args(empty) == SloArgs()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("slo_class", 5),
        ("slo_class", ""),
        ("slo_class", "x" * 64),
        ("slo_class", None),
        ("slo_ttft_ms", "500"),
        ("slo_ttft_ms", True),
        ("slo_ttft_ms", 0),
        ("slo_ttft_ms", -1),
        ("slo_ttft_ms", 1e12),
        ("slo_ttft_ms", 10**400),
        ("slo_tpot_ms", math.nan),
        ("slo_tpot_ms", math.inf),
        ("slo_tpot_ms", [50]),
        ("slo_task_ms", 0),
        ("slo_task_ms", -5),
        ("slo_task_ms", "60000"),
        ("slo_task_ms", 1e12),
        ("slo_task_calls", 0),
        ("slo_task_calls", 1001),
        ("slo_task_calls", 2.0),
        ("slo_task_calls", True),
        ("slo_expected_tokens", 0),
        ("slo_expected_tokens", 1.5),
        ("slo_expected_tokens", True),
        ("slo_expected_tokens", 10**9),
        ("slo_last_round", 2),
        ("slo_last_round", "yes"),
        ("slo_last_round", 1.0),
    ],
)
def test_a_bad_value_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(InvalidFieldError) as raised:
        from_extra_args({key: value})
    assert raised.value.field == key
    assert len(str(raised.value)) < 300


def test_a_typo_is_refused_with_the_keys_that_exist() -> None:
    with pytest.raises(InvalidFieldError, match="slo_tpot_ms") as raised:
        from_extra_args({"slo_tpot": 50})
    assert raised.value.given == "slo_tpot"


@pytest.mark.parametrize("session", ["", "x" * 257, 5, ["a"]])
def test_a_session_that_is_no_short_string_means_none(session: object) -> None:
    assert from_extra_args({"session_id": session}).session_id is None


def test_reads_headers_under_both_names() -> None:
    found = header_args(
        [
            (b"x-slo-class", b"chat"),
            (b"X-LLM-D-SLO-TTFT-MS", b"500"),
            (b"x-slo-tpot-ms", b" 20.5 "),
            (b"x-session-id", b"s-1"),
            (b"content-type", b"application/json"),
        ]
    )
    assert found == {"slo_class": "chat", "slo_ttft_ms": 500, "slo_tpot_ms": 20.5, "session_id": "s-1"}


def test_two_headers_for_one_field_may_agree_but_not_differ() -> None:
    assert header_args([(b"x-slo-ttft-ms", b"500"), (b"x-llm-d-slo-ttft-ms", b"500.0")]) == {"slo_ttft_ms": 500}
    with pytest.raises(InvalidFieldError, match="x-llm-d-slo-ttft-ms: got '400'; allowed: one value"):
        header_args([(b"x-slo-ttft-ms", b"500"), (b"x-llm-d-slo-ttft-ms", b"400")])


@pytest.mark.parametrize(
    "text", ["", "fast", "-5", "0", "1e3", "1_000", "nan", "inf", "0x10", "5ms", "99999999999", "٥"]
)
def test_a_header_that_is_no_number_in_range_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidFieldError) as raised:
        header_args([(b"x-slo-tpot-ms", text.encode())])
    assert raised.value.field == "x-slo-tpot-ms"


@pytest.mark.parametrize("name", ["", "x" * 64])
def test_a_class_header_is_bounded(name: str) -> None:
    with pytest.raises(InvalidFieldError, match="x-slo-class"):
        header_args([(b"x-slo-class", name.encode())])


def test_a_due_time_counts_from_the_arrival_and_the_earlier_of_two_counts() -> None:
    assert from_extra_args({"slo_due_at": 1_700_000_030.5}, 1_700_000_000.0).e2e_ms == 30_500.0
    both = {"slo_due_at": 1_700_000_030, "slo_e2e_ms": 12_000.0}
    assert from_extra_args(both, 1_700_000_000.0).e2e_ms == 12_000.0
    assert from_extra_args(both, 1_700_000_025.0).e2e_ms == 5000.0
    assert header_args([(b"x-slo-due-at", b"1700000030.5")]) == {"slo_due_at": 1_700_000_030.5}


@pytest.mark.parametrize(
    "due_at", [1_699_999_999.0, 1_700_000_000.0, 1_700_086_401.0, 0, -5, float("nan"), "soon", True]
)
def test_a_due_time_in_the_past_or_too_far_ahead_is_refused(due_at: object) -> None:
    with pytest.raises(InvalidFieldError, match="slo_due_at"):
        from_extra_args({"slo_due_at": due_at}, 1_700_000_000.0)


@pytest.mark.parametrize("text", ["", "-1", "1e9", "170000003000000", "12.1234567"])
def test_a_due_time_header_is_digits(text: str) -> None:
    with pytest.raises(InvalidFieldError, match="x-slo-due-at"):
        header_args([(b"x-slo-due-at", text.encode())])


def test_a_task_is_asked_for_in_headers_and_in_the_body() -> None:
    found = header_args([(b"x-slo-task-ms", b"60000"), (b"x-slo-task-calls", b"5"), (b"x-session-id", b"s-1")])
    assert found == {"slo_task_ms": 60000, "slo_task_calls": 5, "session_id": "s-1"}
    args = from_extra_args(found)
    assert (args.task_ms, args.task_calls, args.has_numbers) == (60_000.0, 5, True)
    assert task_of(args.applied(CLASSES)) == TaskPromise(60_000.0, 5)
    assert not SloArgs(task_calls=5).has_numbers
    for text in (b"0", b"1001", b"-1", b"2.5", b"five", b"1e2"):
        with pytest.raises(InvalidFieldError, match="x-slo-task-calls"):
            header_args([(b"x-slo-task-calls", text)])


def test_a_header_marks_the_last_call() -> None:
    assert from_extra_args(header_args([(b"x-slo-last-round", b"1")])).last_round
    assert not from_extra_args(header_args([(b"x-slo-last-round", b"0")])).last_round
    for text in (b"", b"2", b"true", b"01"):
        with pytest.raises(InvalidFieldError, match="x-slo-last-round"):
            header_args([(b"x-slo-last-round", text)])


def test_a_task_without_a_session_is_refused_by_name() -> None:
    tasks = ClassSet({"coder": with_task(single_stage("coder", SLO()), TaskPromise(60_000.0))}, default="coder")
    for args, classes in ((SloArgs(task_ms=5000.0), CLASSES), (SloArgs(), tasks), (SloArgs(last_round=True), tasks)):
        with pytest.raises(InvalidFieldError, match="session_id"):
            args.applied(classes)
    assert task_of(SloArgs(session_id="s").applied(tasks)) == TaskPromise(60_000.0)


def test_the_last_call_of_a_task_is_of_another_class_and_of_the_same_task() -> None:
    coder = with_task(single_stage("coder", SLO()), TaskPromise(60_000.0))
    classes = ClassSet({**CLASSES.classes, "coder": replace(coder, last_round="chat")})
    last = SloArgs(slo_class="coder", session_id="s", last_round=True).applied(classes)
    assert last is not None
    assert (last.name, last.slo.ttft_ms, task_of(last)) == ("chat", 2000.0, TaskPromise(60_000.0))


def test_the_class_applied_follows_request_then_default() -> None:
    default = SloArgs().applied(CLASSES)
    assert default is not None and default.name == "chat"
    own = SloArgs(tpot_ms=30.0).applied(CLASSES)
    assert own is not None and own.slo == SLO(ttft_ms=2000.0, tpot_ms=30.0)
    assert SloArgs(slo_class="none").applied(CLASSES) is None
    custom = SloArgs(slo_class="none", ttft_ms=5.0).applied(CLASSES)
    assert custom is not None and custom.name == "custom"
    with pytest.raises(InvalidFieldError, match=r"slo_class: got 'gold'; allowed: one of \['chat', 'none'\]"):
        SloArgs(slo_class="gold").applied(CLASSES)


_VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70) | st.lists(st.integers(), max_size=2)
)
_KEYS = st.sampled_from(
    ["slo_class", "slo_ttft_ms", "slo_tpot_ms", "slo_expected_tokens", "slo_last_round", "slo_x", "y"]
)


@given(st.dictionaries(_KEYS, _VALUES))
def test_whatever_comes_is_read_or_refused(extra_args: dict[str, object]) -> None:
    try:
        args = from_extra_args(extra_args)
    except InvalidFieldError:
        return
    assert args.ttft_ms is None or 0.0 < args.ttft_ms <= 86_400_000.0


@given(st.lists(st.tuples(st.sampled_from([b"x-slo-class", b"x-slo-ttft-ms", b"x-session-id", b"a"]), st.binary())))
def test_whatever_header_comes_is_read_or_refused(headers: list[tuple[bytes, bytes]]) -> None:
    try:
        found = header_args(headers)
    except InvalidFieldError:
        return
    assert set(found) <= {"slo_class", "slo_ttft_ms", "session_id"}
