"""Starting and stopping a server, with a few lines of Python in vLLM's place."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slos_serve.core.errors import SlosServeError
from slos_serve.launch import server as launch
from slos_serve.launch.cpu_engine import CPU_ENVIRONMENT, cpu_engine_args, cpu_model_args, set_cpu_environment
from slos_serve.launch.endpoint import Endpoint, free_port
from slos_serve.launch.options import option_value
from slos_serve.launch.server import (
    Patience,
    ServerProcess,
    ServerStartError,
    server_command,
    server_environment,
)
from slos_serve.vllm_plugin.config import PluginConfig

# Serves /health, starts a worker in its process group, writes what it was told, ends on SIGTERM.
STAND_IN = """
import http.server, os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; print('worker', flush=True); time.sleep(600)"])
print("worker pid", worker.pid, os.environ["PROMETHEUS_MULTIPROC_DIR"], flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    def command(*_: object, endpoint: Endpoint, **__: object) -> list[str]:
        return [sys.executable, "-c", program, "--port", str(endpoint.port)]

    monkeypatch.setattr(launch, "server_command", command)


def alive(pid: int) -> bool:
    """Whether a process still runs (one that has ended may linger until its parent asks)."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process that was killed is gone soon: the kernel takes a moment, more on a busy machine."""
    until_s = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < until_s:
        time.sleep(0.02)
    return not alive(pid)


def test_the_command_names_plug_in_and_address() -> None:
    given = ["--port", "--x", "--max-model-len", "64", "--host=a", "--port=9", "-y"]
    command = server_command("m", given, endpoint=Endpoint(host="h", port=5), plugin=PluginConfig())
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    assert option_value(command, "--max-model-len") == "64"
    assert option_value(command, "--scheduler-cls") == "slos_serve.vllm_plugin.SLOScheduler"
    assert option_value(command, "--middleware") == "slos_serve.vllm_plugin.SLOMiddleware"
    assert command[5:9] == ["--x", "--max-model-len", "64", "-y"]
    assert command[-4:] == ["--host", "h", "--port", "5"]


def test_the_stock_command_has_no_plug_in() -> None:
    assert not [word for word in server_command("m", endpoint=Endpoint(host="h", port=5)) if "slos_serve" in word]


def test_the_environment_says_which_files_and_drops_leftovers(tmp_path: Path) -> None:
    base = {"PATH": "p", "SLOS_SERVE_EVENTS": "old", "PROMETHEUS_MULTIPROC_DIR": "old"}
    plugin = PluginConfig(classes_path=tmp_path / "c.yaml", profile_path=tmp_path / "p.json")
    assert server_environment(base, tmp_path, plugin, {"X": "1"}) == {
        "PATH": "p",
        "SLOS_SERVE_CLASSES": str(tmp_path / "c.yaml"),
        "SLOS_SERVE_PROFILE": str(tmp_path / "p.json"),
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
        "X": "1",
    }
    assert server_environment(base, tmp_path) == {"PATH": "p", "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}


@pytest.mark.parametrize(
    ("arguments", "found"),
    [([], None), (["--port"], None), (["--port", "5"], "5"), (["--port=6"], "6"), (["--port", "5", "--port=6"], "6")],
)
def test_reads_an_option(arguments: list[str], found: str | None) -> None:
    assert option_value(arguments, "--port") == found


def test_is_entered_when_ready_and_leaves_no_process_and_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, STAND_IN)
    log = tmp_path / "server.log"
    waits: list[float] = []
    endpoint = Endpoint(host="0.0.0.0", port=free_port())
    with ServerProcess("m", output=log, endpoint=endpoint, patience=Patience(on_wait=waits.append)) as server:
        assert server.base_url == f"http://127.0.0.1:{server.port}"
        worker, folder = log.read_text().splitlines()[0].split()[2:]
        assert alive(int(worker))
        assert Path(folder).is_dir()
        server.wait_ready()
        pid = server.pid
    assert waits
    assert not alive(pid)
    assert ended(int(worker))
    assert not Path(folder).exists()
    server.stop()
    with pytest.raises(SlosServeError, match="not running"):
        _ = server.pid


def test_a_server_that_ends_early_shows_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "raise SystemExit('no such model')")
    with pytest.raises(ServerStartError, match=r"(?s)status 1 before.*no such model"), ServerProcess("m"):
        pass


def test_a_server_that_never_answers_is_given_up_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch,
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()",
    )
    server = ServerProcess("m", patience=Patience(0.5))
    server.start()
    pid = server.pid
    with pytest.raises(ServerStartError, match="not ready within"):
        server.wait_ready()
    server.stop(timeout_s=0.1)
    assert not alive(pid)


def test_signals_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, STAND_IN)
    with ServerProcess("m") as server:
        server.send_signal(15)
        assert server.wait() == -15
        server.send_signal(15)


def test_a_port_in_use_is_refused() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ServerStartError, match="already serves"):
            ServerProcess("m", endpoint=Endpoint(host="127.0.0.1", port=other.server_address[1])).start()
        other.shutdown()


def test_importing_the_plug_in_imports_no_engine() -> None:
    program = (
        "import sys, slos_serve.vllm_plugin.middleware, slos_serve.launch.server\n"
        "assert not [name for name in ('vllm', 'torch') if name in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ), timeout=120)


@pytest.mark.parametrize(
    ("flags", "dtype"), [("flags : avx512f amx_bf16", "bfloat16"), ("flags : avx512f avx512_vnni", "float32")]
)
def test_the_dtype_is_one_the_cores_compute_in(tmp_path: Path, flags: str, dtype: str) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(flags, encoding="utf-8")
    assert cpu_engine_args(facts)[:2] == ("--dtype", dtype)
    assert cpu_engine_args(tmp_path / "absent")[:2] == ("--dtype", "float32")


def test_the_cpu_model_gets_defaults_for_what_is_not_given(tmp_path: Path) -> None:
    arguments = cpu_model_args(("--max-model-len=512", "--seed", "1"), tmp_path / "absent")
    defaults = ("--dtype", "float32", "--max-num-seqs", "64", "--enforce-eager")
    assert arguments == (*defaults, "--max-model-len=512", "--seed", "1")


def test_variables_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_CPU_KVCACHE_SPACE": "3"})
    set_cpu_environment()
    assert os.environ == {**CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "3"}
