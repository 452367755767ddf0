"""``slos-serve serve`` passes on address, TLS, start, signals and folders, and keeps secrets to itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slos_serve.cli.serve_run import exit_status
from slos_serve.files.profile_file import save_profile
from slos_serve.launch import server as launch
from slos_serve.launch.endpoint import free_port
from slos_serve.launch.options import option_value
from tests.unit.cli.test_serve import Engine, a_profile, engine, replace_vllm, serve

__all__ = ["engine"]
KEY = "sk-0123456789abcdef"

# Answers /health over TLS, then ends itself.
TLS_STAND_IN = """
import http.server, ssl, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        raise SystemExit(7)
class Server(http.server.HTTPServer):
    def handle_error(self, *args):
        raise
def value(name):
    return sys.argv[sys.argv.index(name) + 1]
server = Server(("127.0.0.1", int(value("--port"))), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(value("--ssl-certfile"), value("--ssl-keyfile"))
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def written(folder: Path) -> str:
    """Everything that lies in the files of a folder."""
    return "\n".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def environments(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments that servers are started with."""
    seen: list[dict[str, str]] = []
    real = launch.server_environment

    def environment(*args: Any, **options: Any) -> dict[str, str]:
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(launch, "server_environment", environment)
    return seen


@pytest.mark.parametrize("how", ["option", "file", "environment"])
def test_no_key_is_written_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine, how: str) -> None:
    commands, started = replace_vllm(monkeypatch, status=0), environments(monkeypatch)
    given = {"option": ["--api-key", KEY, "--hf-token", KEY + "2"], "file": [], "environment": []}[how]
    if how == "file":
        config = tmp_path / "outside" / "vllm.yaml"
        config.parent.mkdir()
        config.write_text(f"api-key: {KEY}\n")
        given = ["--config", str(config)]
    if how == "environment":
        monkeypatch.setenv("VLLM_API_KEY", KEY)
    out = tmp_path / "out"
    out.mkdir()
    status, output = serve("tiny", "--port", free_port(), *given, "--json", out / "serve.json")
    assert status == 0, output
    assert KEY not in output
    assert KEY not in written(out) and KEY not in written(tmp_path / "cache")
    assert json.loads((out / "serve.json").read_text())["command"]
    if how != "file":
        assert started[0]["VLLM_API_KEY"] == KEY, "the server has it, its command line does not"
        assert KEY not in commands[0]


def test_replicas_get_keys_in_the_environment_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine
) -> None:
    seen: list[str] = []
    started = environments(monkeypatch)
    port = free_port()

    def command(module: str, path: str) -> list[str]:
        seen.append(Path(path).read_text())
        return [sys.executable, "-c", "raise SystemExit(4)"]

    monkeypatch.setattr(launch.ServerProcess, "python_command", staticmethod(command))
    monkeypatch.setattr("slos_serve.cli.serve.find_spec", lambda _: object())
    given = ("tiny", "--replicas", 2, "--port", port, "--api-key", KEY, "other", "--json", tmp_path / "s.json")
    status, output = serve(*given)
    assert status == 1 and "status 4" in output
    assert KEY not in "".join(seen) + output + written(tmp_path)
    assert json.loads(started[0]["SLOS_SERVE_API_KEYS"]) == [KEY, "other"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--root-path", "/x"), "--root-path"),
        (("--allowed-origins", '["*"]'), "--allowed-origins"),
        (("--disable-fastapi-docs",), "--disable-fastapi-docs"),
        (("--hf-token", KEY), "set HF_TOKEN in the environment"),
    ],
)
def test_replicas_refuse_front_end_arguments(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, given: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("slos_serve.cli.serve.find_spec", lambda _: object())
    status, output = serve("tiny", "--replicas", 2, *given)
    assert status == 2 and said in output and KEY not in output
    assert not engine.profiled


def test_an_error_message_shows_no_key(engine: Engine) -> None:
    status, output = serve("tiny", "--api-key", KEY, "--port", KEY)
    assert status == 2 and KEY not in output and "***" in output


def test_readiness_is_asked_over_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine) -> None:
    files = [str(tmp_path / "c.pem"), str(tmp_path / "k.pem")]
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=example.org"]
    subprocess.run([*request, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    tls = ["--ssl-certfile", files[0], "--ssl-keyfile", files[1]]

    def command(*_: object, endpoint: Any, **__: object) -> list[str]:
        return [sys.executable, "-c", TLS_STAND_IN, "--port", str(endpoint.port), *tls]

    monkeypatch.setattr(launch, "server_command", command)
    status, output = serve("tiny", "--port", free_port(), *tls, "--startup-timeout", 60)
    assert status == 7, output
    assert "ready at https://127.0.0.1" in output


def test_a_start_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    idle = "import signal; signal.pause()"
    monkeypatch.setattr(launch, "server_command", lambda *_, **__: [sys.executable, "-c", idle])
    status, output = serve("tiny", "--port", free_port(), "--startup-timeout", 1)
    assert status == 1 and "--startup-timeout gives it longer" in output


def test_the_configuration_file_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine) -> None:
    commands = replace_vllm(monkeypatch, status=0)
    config = tmp_path / "vllm.yaml"
    port = free_port()
    config.write_text(f"port: {port}\nhost: 127.0.0.1\n")
    status, output = serve("tiny", f"--config={config}")
    assert status == 0 and f"http://127.0.0.1:{port}" in output
    assert option_value(commands[0], "--config") == str(config)
    assert (option_value(commands[0], "--host"), option_value(commands[0], "--port")) == ("127.0.0.1", str(port))


def test_without_a_host_every_interface_is_listened_on(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    commands = replace_vllm(monkeypatch, status=0)
    status, output = serve("tiny", "--port", free_port())
    assert status == 0 and "(every interface)" in output
    assert option_value(commands[0], "--host") is None


def test_a_headless_node_is_waited_for_and_not_asked(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(launch, "server_command", lambda *_, **__: [sys.executable, "-c", "raise SystemExit(9)"])
    status, output = serve("tiny", "--headless")
    assert status == 9 and "ready" not in output


@pytest.mark.parametrize("left", [False, True])
def test_the_operators_metrics_folder_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine, left: bool
) -> None:
    replace_vllm(monkeypatch, status=0)
    started = environments(monkeypatch)
    folder = tmp_path / "prometheus"
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    if left:
        folder.mkdir()
        (folder / "counter_1.db").touch()
    status, output = serve("tiny", "--port", free_port())
    assert status == 0 and folder.is_dir()
    assert started[0]["PROMETHEUS_MULTIPROC_DIR"] == str(folder)
    assert ("is not empty" in output) is left


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_profile_of_something_else_can_be_forced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine, by: str
) -> None:
    replace_vllm(monkeypatch, status=0)
    started = environments(monkeypatch)
    path = tmp_path / "profile.json"
    save_profile(replace(a_profile("tiny"), device="another"), path)
    given = ["tiny", "--port", str(free_port()), "--profile", str(path)]
    status, output = serve(*given)
    assert status == 2 and "device is 'cpu' here and 'another' in the profile" in output
    if by == "environment":
        monkeypatch.setenv("SLOS_SERVE_ALLOW_PROFILE_MISMATCH", "1")
    status, output = serve(*given, *(["--allow-profile-mismatch"] if by == "option" else []))
    assert status == 0 and "warning: the profile was measured on something else: device" in output
    assert started[-1]["SLOS_SERVE_ALLOW_PROFILE_MISMATCH"] == "1"


def test_a_near_profile_that_is_kept_is_used_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine
) -> None:
    replace_vllm(monkeypatch, status=0)
    save_profile(replace(a_profile(), engine_version="1.0.9"), tmp_path / "cache" / "profiles" / "kept.json")
    status, output = serve("tiny", "--port", free_port())
    assert status == 0 and not engine.profiled
    assert "the profile fits approximately: engine_version is '1.0' here and '1.0.9' in the profile" in output


@pytest.mark.parametrize(
    ("status", "signals", "wanted"), [(0, [], 0), (3, [15], 3), (-9, [], 137), (-9, [15], 143), (None, [2], 130)]
)
def test_the_exit_status_is_the_servers(status: int | None, signals: list[int], wanted: int) -> None:
    assert exit_status(status, signals) == wanted


# A first process of a container: orphans of the server become its children.
INIT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(36, 1)
from slos_serve.launch.server import ServerProcess
from slos_serve.launch.endpoint import Endpoint
idle = "import time; time.sleep(600)"
worker = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {idle!r}]); time.sleep(600)"
server = ServerProcess("m", command=[sys.executable, "-c", worker], endpoint=Endpoint(headless=True))
server.start()
print("up", server.pid, flush=True)
sys.stdin.readline()
print("status", server.stop(5.0))
children = [pid for pid in os.listdir("/proc") if pid.isdecimal()]
left = []
for pid in children:
    try:
        fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    except OSError:
        continue
    if int(fields[1]) == os.getpid():
        left.append(pid)
print("left", left, flush=True)
"""


def test_no_zombie_is_left_to_the_first_process_of_a_container() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None and process.stdin is not None
    pid = process.stdout.readline().split()[1]
    until_s = time.monotonic() + 30.0
    while len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) == 0 and time.monotonic() < until_s:
        time.sleep(0.02)
    out, _ = process.communicate("\n", timeout=60)
    assert out.splitlines() == [f"status {-signal.SIGTERM}", "left []"]
