"""``slos-serve bench`` from the command line against a scripted server, and how it refuses."""

from __future__ import annotations

import csv
import io
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from slos_serve.cli.main import app
from tests.unit.bench.sse_server import served

CLASSES = "classes: {chat: {ttft_ms: 60000, tpot_ms: 60000}, slow: {ttft_slowdown: 3}}\n"


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.yaml"
    path.write_text(CLASSES, encoding="utf-8")
    return path


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def test_named_workload_gives_table_json_and_record(classes: Path, tmp_path: Path) -> None:
    result_file, record = tmp_path / "result.json", tmp_path / "record.jsonl"
    common = ("--classes", classes, "--workload", "chat", "--rate", 50, "--duration", 0.2, "--length-scale", 0.1)
    with served() as server:
        ran = bench("--base-url", server.url, *common, "--seed", 1, "--json", result_file, "--record", record)
        assert ran.exit_code == 0, ran.output
        sent = [call.headers["x-slo-class"] for call in server.calls]
    result = json.loads(result_file.read_text(encoding="utf-8"))
    assert sent == ["chat"] * result["total"]["requests"]
    assert result["total"]["attained"] == result["total"]["requests"] > 0
    assert result["warnings"] == [] or "late" in result["warnings"][0]
    assert result["seed"] == 1 and result["vllm_version"] == "0.32.0"
    assert "chat" in ran.output and "100.0%" in ran.output
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    assert [row["kind"] for row in rows] == ["run", "stolen", *("request" for _ in sent)]


def test_trace_keeps_its_lengths(classes: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:00:00.0,40,3", "2023-11-16 18:00:09.0,90,2"]
    trace.write_text("\n".join(rows) + "\n", encoding="utf-8")
    record = tmp_path / "record.jsonl"
    one_class = tmp_path / "one.yaml"
    one_class.write_text("classes: {only: {ttft_ms: 60000}}\n", encoding="utf-8")
    with served() as server:
        ran = bench(
            "--base-url", server.url, "--classes", one_class, "--trace", trace, "--rate", 100, "--record", record
        )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    first, second = [line for line in lines if line["kind"] == "request"]
    assert lines[0]["kind"] == "run" and lines[1]["kind"] == "stolen"
    assert [row["output_tokens"] for row in (first, second)] == [3, 2]
    assert first["prompt_tokens"] == pytest.approx(40, abs=8)
    assert second["prompt_tokens"] == pytest.approx(90, abs=8)
    assert first["slo_class"] == "only"
    assert second["arrival_s"] == pytest.approx(0.01)


def test_a_trace_of_tasks_is_sent_call_by_call_and_scored_as_tasks(tmp_path: Path) -> None:
    trace, one_class, result_file = tmp_path / "trace.csv", tmp_path / "one.yaml", tmp_path / "result.json"
    trace.write_text(
        "Timestamp,Request tokens,Response tokens,session,pause_ms,task_ms\n"
        "0,40,3,a,,60000\n0.01,50,2,b,,\n0.02,60,2,a,20,\n0.03,60,2,c,,0.001\n0.04,70,3,c,0,\n",
        encoding="utf-8",
    )
    one_class.write_text("classes: {only: {ttft_ms: 60000}}\n", encoding="utf-8")
    with served() as server:
        ran = bench("--base-url", server.url, "--classes", one_class, "--trace", trace, "--json", result_file)
        sessions = [call.headers.get("x-session-id") for call in server.calls]
        tasks_ms = [call.headers.get("x-slo-task-ms") for call in server.calls]
    assert ran.exit_code == 0, ran.output
    result = json.loads(result_file.read_text(encoding="utf-8"))
    assert result["total"]["requests"] == 5
    assert sorted(filter(None, sessions)) == ["a", "a", "c", "c"]
    assert sorted(filter(None, tasks_ms)) == ["0.001", "0.001", "60000.0", "60000.0"]
    assert result["tasks"] == {"only": {"tasks": 2, "attained": 1}}
    assert "only: 1 of 2 tasks in time" in ran.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rate", 1, "--duration", 1), "--workload"),
        (("--workload", "chat", "--trace", "x.csv"), "one of them"),
        (("--workload", "nope", "--rate", 1, "--duration", 1), "mixed"),
        (("--workload", "chat", "--duration", 1), "--rate"),
        (("--workload", "chat", "--rate", 0, "--duration", 1), "above 0"),
        (("--workload", "coding", "--rate", 9, "--duration", 1), "coding"),
        (("--workload", "chat", "--rate", 1, "--duration", 1, "--slo-in", "cookie"), "headers"),
        (("--workload", "chat", "--rate", 1, "--duration", 1, "--api", "soap"), "completions"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: tuple[object, ...], says: str, classes: Path) -> None:
    with served() as server:
        ran = bench("--base-url", server.url, "--classes", classes, *arguments)
        assert not server.calls, "nothing may be sent before the settings are known to fit"
    assert ran.exit_code == 2
    assert says in ran.output
    assert "Traceback" not in ran.output


def test_no_server_says_what_to_do(classes: Path) -> None:
    ran = bench(
        "--base-url", "http://127.0.0.1:9", "--classes", classes, "--workload", "chat", "--rate", 1, "--duration", 1,
        "--wait", 0,
    )  # fmt: skip
    assert ran.exit_code == 1
    assert "is the server up" in ran.output


def test_a_server_that_comes_up_later_is_waited_for(classes: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ready = threading.Event()

    def late() -> None:
        time.sleep(1.0)
        with served(port=port):
            ready.wait(20.0)

    thread = threading.Thread(target=late)
    thread.start()
    try:
        ran = bench(
            "--base-url", f"http://127.0.0.1:{port}", "--classes", classes, "--workload", "chat", "--rate", 50,
            "--duration", 0.1, "--length-scale", 0.1, "--wait", 20,
        )  # fmt: skip
    finally:
        ready.set()
        thread.join()
    assert ran.exit_code == 0, ran.output


def test_the_table_as_csv_and_as_a_page(classes: Path, tmp_path: Path) -> None:
    table, page = tmp_path / "t.csv", tmp_path / "t.html"
    common = ("--classes", classes, "--workload", "chat", "--rate", 50, "--duration", 0.2, "--length-scale", 0.1)
    with served() as server:
        ran = bench("--base-url", server.url, *common, "--csv", table, "--html", page, "--seed", 1)
    assert ran.exit_code == 0, ran.output
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    assert [row["class"] for row in rows] == ["chat", "total"]
    assert rows[0]["attained"] == rows[0]["requests"] and float(rows[0]["ttft_p50_ms"]) > 0.0
    text = page.read_text(encoding="utf-8")
    assert f"<td>{rows[0]['requests']}</td>" in text and "<li>workload: chat</li>" in text
    assert "http" not in text.replace(server.url, "")  # nothing from elsewhere


def test_a_dataset_gives_prompts_lengths_and_classes(classes: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "d.jsonl"
    rows = [{"prompt": f"Question {n}", "output_tokens": 3 + n, "slo_class": "chat"} for n in range(3)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with served() as server:
        ran = bench(
            "--base-url", server.url, "--classes", classes, "--dataset", dataset, "--rate", 50, "--duration", 0.2
        )  # fmt: skip
        bodies = [call.body for call in server.calls]
    assert ran.exit_code == 0, ran.output
    asked = {(body["messages"][0]["content"], body["max_tokens"]) for body in bodies}
    assert asked == {(row["prompt"], row["output_tokens"]) for row in rows}


def test_two_servers_get_the_same_requests_in_turns(classes: Path, tmp_path: Path) -> None:
    result = tmp_path / "c.json"
    common = ("--classes", classes, "--workload", "chat", "--rate", 40, "--duration", 0.2, "--length-scale", 0.1)
    with served() as a, served() as b:
        arguments = ["compare", a.url, b.url, *map(str, common), "--rounds", "2", "--json", str(result)]
        ran = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert ran.exit_code == 0, ran.output
        sent = [[call.body["messages"][0]["content"] for call in server.calls] for server in (a, b)]
    assert sent[0] == sent[1] and len(set(sent[0])) > 1
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["rounds"] == 2 and found["a"]["requests"] == found["b"]["requests"] == len(sent[0])
    assert found["ratios"]["output_tokens_per_s"]["median"] > 0.0
    assert found["ratios"]["output_tokens_per_s"]["high"] is None and "no interval" in ran.output
