"""Trace readers: formats, jitter, optional columns, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.workload.trace_files import calls_before, read_trace


def test_azure_seven_digits_and_crlf(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_bytes(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:17:03.9799600,4808,10\r\n"
        b"2023-11-16 18:17:04.0319601,3180,8\r\n"
    )
    first, second = read_trace(file)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 4808, 10)
    assert second.arrival_s == pytest.approx(0.0520001, abs=1e-6)


def test_azure_optional_columns(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens,slo_class,ttft_ms,tpot_ms\n"
        "2024-05-10 00:00:00.009930+00:00,10,5,chat,500,\n"
    )
    (request,) = read_trace(file)
    assert (request.slo_class, request.ttft_ms, request.tpot_ms) == ("chat", 500.0, None)


def test_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0,1,1\n2023-11-16 18:17:03.0,x,1\n")
    with pytest.raises(InvalidFieldError, match=r"azure\.csv:3: ContextTokens: got 'x'"):
        read_trace(file)


def test_short_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0,1\n")
    with pytest.raises(InvalidFieldError, match=r"azure\.csv:2: GeneratedTokens"):
        read_trace(file)


def test_unknown_header_names_the_formats(tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text("a,b,c\n1,2,3\n")
    with pytest.raises(InvalidFieldError, match="TIMESTAMP,ContextTokens,GeneratedTokens"):
        read_trace(file)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidFieldError, match="existing file"):
        read_trace(tmp_path / "none.csv")
    empty = tmp_path / "empty.csv"
    empty.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(InvalidFieldError, match="at least one request"):
        read_trace(empty)


def _mooncake(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_mooncake_ticks_are_spread_the_same_way_every_time(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"timestamp": tick, "input_length": 1000, "output_length": 5, "hash_ids": [0, number]}
        for number, tick in enumerate([0, 0, 0, 3000, 3000])
    ]
    file = _mooncake(tmp_path / "mooncake.jsonl", rows)
    requests = read_trace(file)
    arrivals = [request.arrival_s for request in requests]
    assert arrivals == sorted(set(arrivals))
    assert arrivals == [request.arrival_s for request in read_trace(file)]
    assert arrivals[-1] < 6.0
    assert [request.block_ids for request in requests] == [(0, number) for number in range(5)]


def test_mooncake_errors_name_the_line(tmp_path: Path) -> None:
    file = _mooncake(tmp_path / "m.jsonl", [{"timestamp": 1, "input_length": 4, "output_length": 1}, {"timestamp": 2}])
    with pytest.raises(InvalidFieldError, match=r"m\.jsonl:2: input_length"):
        read_trace(file)
    file.write_text('{"timestamp": 1, "input_length": 4, "output_length": 1}\n{broken\n')
    with pytest.raises(InvalidFieldError, match=r"m\.jsonl:2: line"):
        read_trace(file)


def test_burstgpt_skips_failures(tmp_path: Path) -> None:
    file = tmp_path / "burst.csv"
    file.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,100,0,100,API log\n118,ChatGPT,1087,230,1317,API log\n"
    )
    read = [(request.arrival_s, request.prompt_tokens, request.output_tokens) for request in read_trace(file)]
    assert read == [(0, 472, 18), (113, 1087, 230)]


def test_impossible_slo_is_named(tmp_path: Path) -> None:
    file = tmp_path / "burst.csv"
    file.write_text("Timestamp,Request tokens,Response tokens,ttft_ms\n5,472,18,-3\n")
    with pytest.raises(InvalidFieldError, match=r"burst\.csv:2: ttft_ms"):
        read_trace(file)


def test_limit(tmp_path: Path) -> None:
    file = tmp_path / "burst.csv"
    file.write_text("Timestamp,Request tokens,Response tokens\n" + "1,2,3\n" * 10)
    assert len(read_trace(file, limit=4)) == 4


TASKS = (
    "Timestamp,Request tokens,Response tokens,session,pause_ms,e2e_ms,task_ms\n"
    "0,200,20,a,,,60000\n1,300,30,b,,8000,\n2,400,25,a,1500,,\n3,500,40,a,0,,\n"
)


def test_answers_and_tasks_have_columns(tmp_path: Path) -> None:
    file = tmp_path / "tasks.csv"
    file.write_text(TASKS)
    read = read_trace(file)
    assert [one.e2e_ms for one in read] == [None, 8000.0, None, None]
    assert [one.pause_ms for one in read] == [None, None, 1500.0, 0.0]
    assert [one.task_ms for one in read] == [60000.0, None, None, None]
    assert calls_before(read) == [-1, -1, 0, 2]


def test_mooncake_lines_take_the_same_keys(tmp_path: Path) -> None:
    row: dict[str, object] = {"timestamp": 0, "input_length": 9, "output_length": 2, "session_id": 7}
    file = _mooncake(tmp_path / "m.jsonl", [row, {**row, "timestamp": 500, "pause_ms": 20, "e2e_ms": 900}])
    assert [(one.session, one.pause_ms, one.e2e_ms) for one in read_trace(file)] == [("7", None, None), ("7", 20, 900)]


@pytest.mark.parametrize("name", ["pause_ms", "task_ms"])
def test_a_call_of_a_task_needs_a_session(tmp_path: Path, name: str) -> None:
    file = tmp_path / "tasks.csv"
    file.write_text(f"Timestamp,Request tokens,Response tokens,session,{name}\n0,2,3,a,5\n1,2,3,,5\n")
    with pytest.raises(InvalidFieldError, match=rf"tasks\.csv:3: {name}: got 5.*session"):
        read_trace(file)


def test_the_first_of_a_session_waits_for_no_answer(tmp_path: Path) -> None:
    file = tmp_path / "tasks.csv"
    file.write_text("Timestamp,Request tokens,Response tokens,session,pause_ms\n0,2,3,a,5\n")
    with pytest.raises(InvalidFieldError, match=r"tasks\.csv:2: pause_ms: got 5.*session 'a'"):
        calls_before(read_trace(file))


def test_a_quoted_header_is_a_header(tmp_path: Path) -> None:
    file = tmp_path / "quoted.csv"
    file.write_text('"Timestamp","Request tokens","Response tokens"\n"0","2","3"\n')
    (request,) = read_trace(file)
    assert (request.prompt_tokens, request.output_tokens) == (2, 3)


@pytest.mark.parametrize("line", ["9" * 200_000 + ",2,3", '0,2,"' + "9" * 200_000])
def test_a_field_that_no_csv_has_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "wide.csv"
    file.write_text(f"Timestamp,Request tokens,Response tokens\n0,2,3\n{line}\n")
    with pytest.raises(InvalidFieldError, match=r"wide\.csv:3: line: .*a line of CSV"):
        read_trace(file)


def test_a_header_that_no_csv_has_is_named(tmp_path: Path) -> None:
    file = tmp_path / "wide.csv"
    file.write_text("9" * 200_000)
    with pytest.raises(InvalidFieldError, match=r"wide\.csv:1: trace header"):
        read_trace(file)


@pytest.mark.parametrize("line", ['{"timestamp": ' + "9" * 5000 + "}", "[" * 100_000, '{"a":' * 100_000])
def test_json_that_python_refuses_is_named(tmp_path: Path, line: str) -> None:
    file = _mooncake(tmp_path / "m.jsonl", [{"timestamp": 0, "input_length": 9, "output_length": 2}])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InvalidFieldError, match=r"m\.jsonl:2: line: .*a JSON object"):
        read_trace(file)


def test_a_session_of_null_is_none(tmp_path: Path) -> None:
    row: dict[str, object] = {"timestamp": 0, "input_length": 9, "output_length": 2}
    file = _mooncake(tmp_path / "m.jsonl", [{**row, "session_id": None}, {**row, "session_id": ""}])
    assert [one.session for one in read_trace(file)] == [None, None]
