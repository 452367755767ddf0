"""classes check and schema, doctor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from typer.testing import CliRunner

from slos_serve.cli.doctor import environment_findings, server_findings
from slos_serve.cli.main import app
from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.class_file import parse_class_file
from slos_serve.files.class_schema import class_file_schema
from slos_serve.files.profile_file import load_profile
from slos_serve.launch.endpoint import free_port
from slos_serve.vllm_plugin.metrics import EngineLabels, SchedulerMetrics
from tests.unit.cli.http_page import serving

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "classes.yaml"
PROFILE = ROOT / "src" / "slos_serve" / "profiles" / "opt-13b-a100.json"
RUNNER = CliRunner()
SCHEMA = jsonschema.Draft202012Validator(class_file_schema())


def test_a_right_file_is_shown_with_what_it_promises() -> None:
    result = RUNNER.invoke(app, ["classes", "check", str(EXAMPLE), "--profile", str(PROFILE)])
    assert result.exit_code == 0, result.output
    assert "chat (default)" in result.output and "1000: 636 ms" in result.output


def test_answers_tasks_and_weaker_promises_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "whole.yaml"
    file.write_text(
        "classes:\n  json: {e2e_ms: 8000}\n  agent: {task_ms: 60000}\n"
        "  chat: {ttft_ms: 900, otherwise: [{ttft_ms: 8000}, {e2e_ms: 120000}]}\n"
    )
    result = RUNNER.invoke(app, ["classes", "check", str(file)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for cell in ("answer 8000 ms", "task 60000 ms", "2 weaker"):
        assert cell in result.output


def test_a_fault_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("classes:\n  a: {ttft_ms: 5}\n  b:\n    tpot_msx: 3\n")
    result = RUNNER.invoke(app, ["classes", "check", str(file)])
    assert result.exit_code == 2
    assert f"{file}:4:" in result.stderr and "tpot_msx" in result.stderr


def test_promises_that_no_idle_engine_keeps_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "fast.yaml"
    file.write_text(
        "classes:\n  a: {ttft_ms: 5, tpot_ms: 100}\n  b: {stages: [{tpot_ms: 2, max_tokens: 3}, {tpot_ms: 90}]}\n"
    )
    result = RUNNER.invoke(app, ["classes", "check", str(file), "--profile", "opt-13b-a100"])
    assert result.exit_code == 2
    assert "classes.a.ttft_ms: 5" in result.stderr and "classes.b.stages[0].tpot_ms: 2" in result.stderr
    assert RUNNER.invoke(app, ["classes", "check", str(file)]).exit_code == 0


def test_the_schema_that_is_printed_takes_the_example() -> None:
    result = RUNNER.invoke(app, ["classes", "schema"])
    jsonschema.Draft202012Validator.check_schema(json.loads(result.output))
    SCHEMA.validate(yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")))


NUMBERS = st.one_of(st.integers(-2, 20_000), st.floats(allow_nan=True), st.booleans(), st.text(max_size=3), st.none())
FIELDS = st.dictionaries(
    st.sampled_from(
        ["ttft_ms", "ttft_slowdown", "ttft_floor_ms", "tpot_ms", "weight", "max_stall_ms", "when_full", "x"]
    ),
    st.one_of(NUMBERS, st.sampled_from(["reject", "reject_503", "best_effort"])),
    max_size=4,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({"classes": st.dictionaries(st.sampled_from("abc"), FIELDS, max_size=3)}))
def test_the_schema_and_the_reader_agree(document: dict[str, object]) -> None:
    text = json.dumps(document)
    where, read = "f:1", True
    try:
        parse_class_file(text, "f")
    except InvalidFieldError as error:
        where, read = str(error.where), False
    assert where.startswith("f:")
    if not re.search(r"NaN|Infinity|\de[-+]?\d", text):  # JSON's words for numbers that YAML 1.1 reads as text
        assert SCHEMA.is_valid(document) == read


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        parse_class_file(text, "f")
    except InvalidFieldError:
        return
    pytest.fail("random text is no class file")


def findings(environment: dict[str, str]) -> dict[str, str]:
    found = environment_findings(environment, device=lambda: None)
    return {said.split("=")[0].split(" ")[0].rstrip(":"): level for level, said, _ in found}


def test_the_doctor_finds_what_the_environment_lacks(tmp_path: Path) -> None:
    right = {
        "SLOS_SERVE_CLASSES": str(EXAMPLE),
        "SLOS_SERVE_PROFILE": str(PROFILE),
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
    }
    assert set(findings(right).values()) <= {"ok"} | ({"error"} if "vLLM" not in findings(right) else set())
    assert findings(right)["PROMETHEUS_MULTIPROC_DIR"] == "ok"
    (tmp_path / "old.db").touch()
    wrong = right | {"SLOS_SERVE_CLASSES": "/none", "SLOS_SERVE_PLAN_LIMIT_MS": "-1"}
    found = findings(wrong)
    assert found["SLOS_SERVE_CLASSES"] == "error" and found["SLOS_SERVE_PLAN_LIMIT_MS"] == "error"
    assert found["PROMETHEUS_MULTIPROC_DIR"] == "warning"
    assert findings({})["PROMETHEUS_MULTIPROC_DIR"] == "warning"


def test_a_profile_of_another_device_is_an_error_here(tmp_path: Path) -> None:
    measured = load_profile(PROFILE).identity.device
    environment = {"SLOS_SERVE_PROFILE": str(PROFILE)}

    def said(device: str | None, **given: bool) -> list[str]:
        found = environment_findings(environment, device=lambda: device, **given)
        return [f"{finding.level} {finding.said}" for finding in found if "measured on something" in finding.said]

    assert said(measured) == said(None) == said("another GPU", serves=True) == []
    (found,) = said("another GPU")
    assert found.startswith("error") and "another GPU" in found and str(measured) in found
    environment["SLOS_SERVE_ALLOW_PROFILE_MISMATCH"] = "1"
    assert said("another GPU")[0].startswith("warning"), "the server starts all the same"
    environment["SLOS_SERVE_PROFILE"] = str(tmp_path / "none.json")
    assert said("another GPU") == [], "the missing file is the finding"


def test_a_server_that_plans_steps_needs_no_variables_in_this_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLOS_SERVE_PROFILE", raising=False)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    (tmp_path / "of_the_running_server.db").touch()
    monkeypatch.setenv("SLOS_SERVE_CLASSES", "/none")
    metrics = SchedulerMetrics(["chat"], EngineLabels("m", "0"))

    def said() -> str:
        page = generate_latest(metrics.registry).decode()
        monkeypatch.setattr("slos_serve.cli.doctor.fetch", lambda _: page)
        return RUNNER.invoke(app, ["doctor", "--url", "http://s:1"]).output

    planned = said()
    assert "steps are planned" in planned and "SLOS_SERVE_CLASSES: " in planned
    assert "SLOS_SERVE_PROFILE" not in planned and "not empty" not in planned
    metrics.armed(False)
    assert "SLOS_SERVE_PROFILE is not set" in said()


class _NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def serve_404() -> Iterator[str]:
    with serving(_NotFound) as address:
        yield address


def server(metrics: SchedulerMetrics, more: str = "") -> list[tuple[str, str]]:
    page = generate_latest(metrics.registry).decode() + more
    pages = {"http://s:1/metrics": page}
    return [(level, said) for level, said, _ in server_findings("http://s:1/v1", pages.__getitem__)]


def test_the_doctor_reads_a_servers_metrics() -> None:
    metrics = SchedulerMetrics(["chat"], EngineLabels("m", "0"))
    verdicts = 'slos_serve:answers_total{slo_class="chat"} 3.0\n'
    assert server(metrics, verdicts) == [("ok", "steps are planned (slos_serve:armed is 1)")]
    assert [level for level, _ in server(metrics)] == ["ok", "warning"]
    fleet = 'slos_serve:requests_total{replica="x7vk",slo_class="chat"} 3.0\n'
    assert server(metrics, fleet) == [("ok", "steps are planned (slos_serve:armed is 1)")]
    metrics.armed(False)
    metrics.invalid_field()
    metrics.correction(2.0)
    metrics.engine(async_scheduling=False, profile_mismatch=True)
    said = " ".join(text for _, text in server(metrics, verdicts))
    assert "asynchronous scheduling is off" in said and "measured on something else" in said
    assert "not armed" in said and "2.00 times" in said and "1 requests came with unusable" in said
    without = list(server_findings("http://s:1", {"http://s:1/metrics": "up 1\n"}.__getitem__))
    assert [finding.level for finding in without] == ["error"] and "no slos_serve metrics" in without[0].said
    for cause in ("--scheduler-cls", "SLOS_SERVE_PROFILE", "PROMETHEUS_MULTIPROC_DIR"):
        assert cause in without[0].mend


def test_an_address_that_cannot_be_asked_is_told_from_one_that_answers_something_else(
    serve_404: str,
) -> None:
    def said(url: str) -> str:
        result = RUNNER.invoke(app, ["doctor", "--url", url])
        assert result.exit_code == 1
        return result.output

    assert "localhost:8000 is no address. Write it as http://HOST:PORT" in said("localhost:8000")
    assert f"{serve_404}/metrics answers 404" in said(serve_404)
    assert "does not answer ([Errno 111] Connection refused)" in said(f"http://127.0.0.1:{free_port()}")


def test_a_server_elsewhere_needs_no_vllm_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr("slos_serve.cli.doctor.version", missing)
    alone = [said for _, said, _ in environment_findings({})]
    beside = [said for _, said, _ in environment_findings({}, serves=True)]
    assert "vLLM is not installed here" in alone and "vLLM is not installed here" not in beside
