"""The class file: what is read from it, and that every error leads to the line to mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, Stage, WhenFull
from slos_serve.files.class_file import load_classes, parse_class_file, parse_classes
from slos_serve.planning.settings import RANGES, WHOLE, PlannerSettings

EXAMPLE = """\
default_class: chat
max_stall_ms: 1500
classes:
  chat: {ttft_slowdown: 5, tpot_ms: 100}
  code: {ttft_ms: 1500, tpot_ms: 50, weight: 2, max_stall_ms: 500}
  reason:
    ttft_slowdown: 3
    ttft_floor_ms: 400
    stages: [{tpot_ms: 50, end_token_id: 7}, {tpot_ms: 100}]
  batch:
"""


def test_reads_every_field() -> None:
    classes = parse_classes(EXAMPLE, "classes.yaml")
    assert list(classes.classes) == ["chat", "code", "reason", "batch"]
    assert classes.default == "chat"
    chat, code, reason, batch = classes
    assert chat.slo == SLO(ttft_slowdown=5.0, tpot_ms=100.0)
    assert chat.max_stall_ms == 1500.0
    assert (code.slo.ttft_ms, code.weight, code.max_stall_ms) == (1500.0, 2.0, 500.0)
    assert reason.stages == (
        Stage(slo=SLO(ttft_slowdown=3.0, ttft_floor_ms=400.0, tpot_ms=50.0), end_token_id=7),
        Stage(slo=SLO(tpot_ms=100.0)),
    )
    assert batch.slo.best_effort


def test_tpot_of_the_class_holds_for_stages_that_give_none() -> None:
    text = "classes: {a: {tpot_ms: 80, stages: [{max_tokens: 10}, {tpot_ms: 40}]}}"
    (found,) = parse_classes(text, "f")
    assert [stage.slo.tpot_ms for stage in found.stages] == [80.0, 40.0]


def test_names_are_taken_as_written() -> None:
    assert list(parse_classes("classes: {no: {}, 7: {tpot_ms: 5}}", "f").classes) == ["no", "7"]


def test_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(EXAMPLE)
    assert len(load_classes(path)) == 4
    assert load_classes(str(path)).default == "chat"


@pytest.mark.parametrize(
    ("text", "line", "field", "said"),
    [
        ("", 1, "class file", "classes"),
        ("- a\n", 1, "class file", "mapping"),
        ("classes: [\n", 2, "class file", "YAML"),
        ("default_class: a\n", 1, "classes", "at least one"),
        ("classes:\n", 1, "classes", "at least one"),
        ("classes: {a: {}}\ncolour: 1\n", 2, "key of class file", "default_class"),
        ("classes:\n  a:\n    tpot: 5\n", 3, "key of classes.a", "tpot_ms"),
        ("classes:\n  a: {}\n  a: {}\n", 3, "classes.a", "once"),
        ("classes:\n  a:\n    tpot_ms: 5\n    tpot_ms: 6\n", 4, "classes.a.tpot_ms", "once"),
        ("classes:\n  a:\n    tpot_ms: fast\n", 3, "classes.a.tpot_ms", "number in (0"),
        ("classes:\n  a:\n    tpot_ms: true\n", 3, "classes.a.tpot_ms", "number in (0"),
        ("classes:\n  a:\n    tpot_ms: -1\n", 3, "classes.a.tpot_ms", "number in (0"),
        ("classes:\n  a:\n    tpot_ms: .nan\n", 3, "classes.a.tpot_ms", "number in (0"),
        ("classes:\n  a:\n    tpot_ms: [1]\n", 3, "classes.a.tpot_ms", "number in (0"),
        ("classes:\n  a:\n    tpot_ms:\n", 3, "classes.a.tpot_ms", "number in (0"),
        ("classes:\n  a:\n    weight: 1001\n", 3, "classes.a.weight", "1000]"),
        ("classes:\n  a:\n    ttft_slowdown: 0.5\n", 3, "classes.a.ttft_slowdown", "[1,"),
        ("classes:\n  a:\n    ttft_ms: 5\n    ttft_slowdown: 5\n", 4, "classes.a.ttft_slowdown", "not both"),
        ("classes:\n  a:\n    ttft_floor_ms: 5\n", 3, "classes.a.ttft_floor_ms", "beside ttft_slowdown"),
        ("max_stall_ms: 0\nclasses: {a: {}}\n", 1, "max_stall_ms", "number in (0"),
        ("classes:\n  a b: {}\n", 2, "class name", "letters"),
        ("classes:\n  none: {}\n", 2, "class name", "any name but"),
        ("classes:\n  a: 5\n", 2, "classes.a", "mapping"),
        ("classes: {a: {}}\ndefault_class: b\n", 2, "default_class", "['a']"),
        ("classes: {a: {}}\ndefault_class: [a]\n", 2, "default_class", "a name"),
        ("classes:\n  a:\n    stages: []\n", 3, "classes.a.stages", "1 to 16"),
        ("classes:\n  a:\n    stages:\n    - {}\n    - {}\n", 4, "classes.a.stages[0]", "never begin"),
        ("classes:\n  a:\n    stages: [{max_tokens: 5}]\n", 3, "classes.a.stages[0].max_tokens", "last stage"),
        ("classes:\n  a:\n    stages: [{max_tokens: 0}, {}]\n", 3, "classes.a.stages[0].max_tokens", "[1,"),
        ("classes:\n  a:\n    stages: [{end_token_id: 1.5}, {}]\n", 3, "classes.a.stages[0].end_token_id", "[0,"),
        ("classes:\n  a:\n    stages: [{ttft_ms: 5}]\n", 3, "key of classes.a.stages[0]", "end_token_id"),
        ("classes:\n  ? [a]\n  : {}\n", 2, "key of classes", "a name"),
        ("classes:\n  a:\n    when_full: queue\n", 3, "classes.a.when_full", "'reject'"),
        ("classes:\n  a:\n    when_full: [reject]\n", 3, "classes.a.when_full", "a name"),
        ("classes:\n  b: {}\n  a:\n    last_round: c\n", 4, "classes.a.last_round", "['a', 'b']"),
    ],
)
def test_an_error_names_line_field_and_what_is_allowed(text: str, line: int, field: str, said: str) -> None:
    with pytest.raises(InvalidFieldError) as raised:
        parse_classes(text, "my.yaml")
    assert raised.value.where == f"my.yaml:{line}"
    assert raised.value.field == field
    assert said in str(raised.value)


def test_what_routers_do_when_full_and_the_last_round() -> None:
    classes = parse_classes("classes:\n  a: {when_full: reject, last_round: b}\n  b: {ttft_ms: 5}\n", "my.yaml")
    assert classes.classes["a"].when_full is WhenFull.REJECT
    assert classes.classes["b"].when_full is WhenFull.BEST_EFFORT
    assert classes.resolve("a") == classes.classes["a"]
    assert classes.resolve("a", last_round=True) == classes.classes["b"]
    last = classes.resolve("a", ttft_ms=7.0, last_round=True)
    assert last is not None and (last.name, last.slo.ttft_ms) == ("b", 7.0)
    assert classes.resolve("b", last_round=True) == classes.classes["b"]


def test_too_many_classes_are_refused() -> None:
    text = "classes:\n" + "".join(f"  c{index}: {{}}\n" for index in range(33))
    with pytest.raises(InvalidFieldError, match=r"my.yaml:2: classes: got 33; allowed: at most 32"):
        parse_classes(text, "my.yaml")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "gone.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidFieldError, match=r"gone\.yaml"):
        load_classes(path)


def test_every_setting_of_the_planner_can_be_written() -> None:
    text = "classes: {chat: {ttft_ms: 900}}\nscheduler:\n"
    given = {name: high if name in WHOLE else 0.5 * (low + high) for name, (low, high, _) in RANGES.items()}
    text += "".join(f"  {name}: {int(value) if name in WHOLE else value}\n" for name, value in given.items())
    assert parse_class_file(text, "c.yaml").scheduler == PlannerSettings(**given)  # type: ignore[arg-type]
    assert parse_class_file("classes: {chat: {}}", "c.yaml").scheduler == PlannerSettings()


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("margin: 2", "scheduler.margin"),
        ("margin: many", "scheduler.margin"),
        ("max_draft_tokens: 1.5", "scheduler.max_draft_tokens"),
        ("max_draft_tokens: 11", "scheduler.max_draft_tokens"),
        ("max_labels: 3", "key of scheduler"),
        ("aging_s: [1]", "scheduler.aging_s"),
    ],
)
def test_a_setting_that_cannot_be_used_names_its_line(line: str, field: str) -> None:
    with pytest.raises(InvalidFieldError) as found:
        parse_class_file(f"classes: {{chat: {{}}}}\nscheduler:\n  {line}\n", "c.yaml")
    assert found.value.field == field
    assert found.value.where == "c.yaml:3"


def test_weaker_promises_in_order() -> None:
    chat = parse_classes(
        "classes:\n  chat:\n    ttft_ms: 500\n    tpot_ms: 50\n"
        "    otherwise: [{ttft_ms: 8000, tpot_ms: 150}, {tpot_ms: 300}]\n"
        "    stages: [{tpot_ms: 20, max_tokens: 5}, {}]\n",
        "c.yaml",
    ).classes["chat"]
    first, second, third = chat.promises
    assert first is chat
    assert [stage.slo for stage in second.stages] == [SLO(ttft_ms=8000.0, tpot_ms=150.0), SLO(tpot_ms=150.0)]
    assert [stage.slo for stage in third.stages] == [SLO(tpot_ms=300.0), SLO(tpot_ms=300.0)]
    assert (second.name, second.stages[0].max_tokens, second.promises) == ("chat", 5, (second,))
    assert chat.with_overrides(ttft_ms=700.0).otherwise == ()


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("chat:\n    tpot_ms: 5\n    otherwise: {tpot_ms: 9}", 4, "classes.chat.otherwise"),
        ("chat:\n    tpot_ms: 5\n    otherwise: []", 4, "classes.chat.otherwise"),
        ("chat:\n    tpot_ms: 5\n    otherwise: [{tpot_ms: 9}, {}]", 4, "classes.chat.otherwise[1]"),
        ("chat:\n    tpot_ms: 5\n    otherwise:\n      - {weight: 9}", 5, "key of classes.chat.otherwise[0]"),
        ("chat:\n    tpot_ms: 5\n    otherwise: [{tpot_ms: 9}, {tpot_ms: -1}]", 4, "classes.chat.otherwise[1].tpot_ms"),
        ("chat:\n    otherwise: [{tpot_ms: 9}]", 3, "classes.chat.otherwise"),
        ("chat:\n    tpot_ms: 5\n    otherwise: [{tpot_ms: 5}]", 3, "classes.chat.otherwise[0]"),
        ("chat:\n    tpot_ms: 5\n    otherwise: [{tpot_ms: 9}, {tpot_ms: 8}]", 3, "classes.chat.otherwise[1]"),
        (
            "chat:\n    ttft_slowdown: 5\n    otherwise: [{ttft_slowdown: 4, tpot_ms: 8}]",
            3,
            "classes.chat.otherwise[0]",
        ),
    ],
)
def test_a_weaker_promise_that_cannot_be_used_names_its_line(text: str, line: int, field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        parse_classes(f"classes:\n  {text}", "c.yaml")
    assert (caught.value.where, caught.value.field) == (f"c.yaml:{line}", field)


def test_numbers_are_what_people_write() -> None:
    found = parse_class_file("classes:\n  chat: {ttft_ms: 1e3, tpot_ms: 5.5E+1}\n", "f").classes.classes["chat"]
    assert found.slo == SLO(ttft_ms=1000.0, tpot_ms=55.0)
    for given in ("12:30:00", "1:30", "'1e3'"):
        with pytest.raises(InvalidFieldError, match="ttft_ms"):
            parse_class_file(f"classes:\n  chat: {{ttft_ms: {given}}}\n", "f")


@pytest.mark.parametrize(
    ("strict", "loose"),
    [
        (SLO(ttft_ms=900.0, tpot_ms=50.0), SLO(tpot_ms=50.0)),
        (SLO(ttft_slowdown=3.0), SLO(ttft_slowdown=3.0, ttft_floor_ms=900.0)),
        (SLO(e2e_ms=900.0, tpot_ms=1.0), SLO(e2e_ms=900.0)),
    ],
)
def test_a_promise_implies_a_looser_one_of_its_kind(strict: SLO, loose: SLO) -> None:
    assert strict.implies(loose) and strict.implies(strict) and not loose.implies(strict)
    assert not strict.implies(SLO(ttft_ms=1.0)) and not SLO(ttft_ms=1.0).implies(SLO(ttft_slowdown=100.0))
