"""``slos-serve top`` against a server in miniature that gives a document of the live page."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slos_serve.cli.main import app
from slos_serve.cli.top import bars
from slos_serve.core.verdict import Verdict, Why
from slos_serve.vllm_plugin.live.state import LiveState
from tests.unit.vllm_plugin.live.builders import CLASSES, Engine


class State:
    """What the server answers."""

    def __init__(self) -> None:
        self.document: Any = {}
        self.key: str | None = None


@pytest.fixture
def server() -> Iterator[tuple[str, State]]:
    state = State()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = state.key is None or self.headers.get("authorization") == f"Bearer {state.key}"
            found = self.path == "/slo/state" and state.document is not None
            self.send_response(401 if not allowed else 200 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps(state.document).encode())

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", state
        running.shutdown()
        thread.join()


def document(folder: Path) -> dict[str, Any]:
    """What a server would say after one kept and one broken promise."""
    engine, state = Engine(folder), LiveState("a-model", CLASSES)
    engine.watched.touch()
    engine.ends(CLASSES.classes["chat"], Verdict.ADMITTED)
    engine.ends(CLASSES.classes["chat"], Verdict.ADMITTED, kept=False)
    engine.steps({"a": 300, "b": 1}, {}, 0.05)
    engine.queues((0, 3, 1), (2, 0, 0))
    engine.after(1.0)
    message = json.loads(json.dumps(engine.wire.newest()))
    message["streams"] = [
        {
            "slo_class": "chat",
            "verdict": "admitted",
            "phase": "decode",
            "slack_ms": -12.0,
            "age_s": 3.0,
            "prompt_tokens": 77,
            "output_tokens": 9,
        }
    ]
    state.heard(message)
    state.told("chat", Verdict.REJECTED, Why.KV_FULL)
    state.gauges({"total": 100, "used": 25, "forecast_peak": 60}, {"chat": 4})
    return state.document()


def test_one_look_shows_every_part(server: tuple[str, State], tmp_path: Path) -> None:
    url, state = server
    state.document = document(tmp_path)
    told = CliRunner().invoke(app, ["top", url + "/v1", "--once", "--every", "0.2"])
    assert told.exit_code == 0, told.output
    for text in ("a-model: 4 running, 2 waiting, KV 25% used", "50.0%", "-12", "kv_full: ", "planned", "300"):
        assert text in told.output
    told = CliRunner().invoke(app, ["top", url, "--json"])
    assert json.loads(told.output) == json.loads(json.dumps(state.document))


def test_weaker_promises_have_a_column_where_there_are_some(server: tuple[str, State], tmp_path: Path) -> None:
    url, state = server
    state.document = document(tmp_path)
    assert "weaker" not in CliRunner().invoke(app, ["top", url, "--once"]).output
    chat = state.document["classes"][0]
    chat["requests"]["second-best"], chat["attained"]["second-best"] = 4, 3
    told = CliRunner().invoke(app, ["top", url, "--once"]).output
    assert "weaker" in told and "3 of 4" in told


def test_a_key_comes_from_the_environment(server: tuple[str, State], tmp_path: Path, monkeypatch: Any) -> None:
    url, state = server
    state.document, state.key = document(tmp_path), "sesame"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    refused = CliRunner().invoke(app, ["top", url, "--json"])
    assert refused.exit_code == 1 and "set VLLM_API_KEY" in refused.output
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert CliRunner().invoke(app, ["top", url, "--json"]).exit_code == 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "has no live page"),
        ({"format": "slos-serve-live/99"}, "not of this version"),
        ([], "not of this version"),
    ],
)
def test_what_is_no_state_is_said(server: tuple[str, State], answer: Any, said: str) -> None:
    url, state = server
    state.document = answer
    told = CliRunner().invoke(app, ["top", url, "--json"])
    assert told.exit_code == 1 and said in told.output


@pytest.mark.parametrize(("url", "said"), [("http://127.0.0.1:9", "does not answer"), ("localhost:8000", "no address")])
def test_a_server_that_is_not_there(url: str, said: str) -> None:
    told = CliRunner().invoke(app, ["top", url, "--json"])
    assert told.exit_code == 1 and said in told.output


def test_bars_are_as_high_as_the_share_that_was_kept() -> None:
    assert bars({"promised": [0, 4, 4, 4], "kept": [0, 0, 2, 4]}).plain == " ▁▄█"
    assert bars(None).plain == ""
