"""``slos-serve explain`` on described loads and on a server's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slos_serve.cli.main import app
from tests.unit.cli.http_page import serving

RUNNER = CliRunner()
CLASSES = """
classes:
  chat: {ttft_ms: 1000, tpot_ms: 100}
  coding: {ttft_ms: 1000, tpot_ms: 40, when_full: reject}
default_class: chat
"""


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    return ["explain", "--classes", str(tmp_path / "classes.yaml"), "--profile", "opt-13b-a100"]


def test_a_request_that_fits_is_explained_plainly(options: list[str]) -> None:
    result = RUNNER.invoke(app, [*options, "--prompt-tokens", "800", "--running", "chat=20"])
    assert result.exit_code == 0, result.output
    assert "admitted (fits)" in result.output and "1000 ms promised" in result.output
    assert "ttft_too_late binds" in result.output


def test_one_that_does_not_is_named_with_what_binds(options: list[str]) -> None:
    given = ["--class", "coding", "--prompt-tokens", "1500", "--waiting", "coding=20", "--load-prompt-tokens", "1500"]
    result = RUNNER.invoke(app, [*options, *given, "--json", "-"])
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert (found["verdict"], found["reason"], found["status"]) == ("rejected", "ttft_too_late", 429)
    decodes = [*options, "--class", "coding", "--prompt-tokens", "100", "--running", "coding=250"]
    busy = RUNNER.invoke(app, [*decodes, "--load-prompt-tokens", "50", "--load-answer-tokens", "60", "--json", "-"])
    assert json.loads(busy.stdout)["reason"] == "decode_rate"


def test_a_prompt_that_is_too_long_for_an_idle_engine_is_told_so(options: list[str]) -> None:
    result = RUNNER.invoke(app, [*options, "--prompt-tokens", "50000"])
    assert result.exit_code == 1 and "even alone on the engine" in result.output


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--running", "chat"], "CLASS=N"),
        (["--running", "gold=2"], "--running: got 'gold'"),
        (["--waiting", "none=2"], "--waiting: got 'none'"),
        (["--class", "gold"], "gold"),
        (["--profile", "no-such"], "no-such"),
        (["--url", "http://localhost:8000", "--waiting", "chat=1"], "--classes, --profile, --waiting: not with --url"),
    ],
)
def test_what_cannot_be_answered_is_one_line_and_status_2(options: list[str], given: list[str], said: str) -> None:
    result = RUNNER.invoke(app, [*options, "--prompt-tokens", "10", *given])
    assert result.exit_code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--classes and --profile missing"),
        (["--classes", "c.yaml"], "--profile missing: give --url"),
        (["--url", "localhost:8000"], "begins with http://"),
    ],
)
def test_a_question_that_lacks_something_says_what(given: list[str], said: str) -> None:
    result = RUNNER.invoke(app, ["explain", "--prompt-tokens", "10", *given])
    assert result.exit_code == 2 and said in result.stderr


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path.startswith("/slo/explain?class=chat&prompt_tokens=7")
        body: dict[str, object] = {"error": {"message": "slo_class: got 'x'"}}
        if known:
            body = {"slo_class": "chat", "verdict": "admitted", "reason": "fits", "text": "Yes.", "status": None}
            body |= {"prompt_tokens": 7, "newer_field": 1}
        self.send_response(200 if known else 404 if "class=old" in self.path else 400)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    with serving(_Server) as address:
        yield address


def test_a_running_server_is_asked(server: str) -> None:
    result = RUNNER.invoke(app, ["explain", "--url", f"{server}/v1", "--class", "chat", "--prompt-tokens", "7"])
    assert result.exit_code == 0 and "admitted (fits): Yes." in result.output
    wrong = RUNNER.invoke(app, ["explain", "--url", server, "--class", "x", "--prompt-tokens", "7"])
    assert wrong.exit_code == 2 and "got 'x'" in wrong.stderr
    old = RUNNER.invoke(app, ["explain", "--url", server, "--class", "old", "--prompt-tokens", "7"])
    assert old.exit_code == 2 and "no /slo/explain" in old.stderr and "plans nothing (no profile" in old.stderr
