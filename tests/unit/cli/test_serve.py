"""``slos-serve serve`` up to the server's command line, with a few lines of Python in vLLM's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from slos_serve.cli.main import app
from slos_serve.files.engine_identity import EngineIdentity
from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.launch import server as launch
from slos_serve.launch.cpu_engine import CPU_ENVIRONMENT
from slos_serve.launch.endpoint import free_port
from slos_serve.launch.options import option_value
from slos_serve.launch.serve_config import ServeConfig
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.ray_serve import arguments
from slos_serve.vllm_plugin.metrics import MULTIPROC_ENV

# Answers /health, then ends itself like a server that was told to.
STAND_IN = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        raise SystemExit(%d)
class Server(http.server.HTTPServer):
    def handle_error(self, *args):
        raise
port = int(sys.argv[sys.argv.index("--port") + 1])
Server(("127.0.0.1", port), Handler).serve_forever()
"""


def identity(model: str, *_: object) -> EngineIdentity:
    return EngineIdentity(model=model, device="cpu", engine_version="1.0", dtype="bfloat16", tensor_parallel=1)


def a_profile(model: str = "tiny") -> Profile:
    return Profile(
        model_name=model,
        device="cpu",
        engine="vllm",
        engine_version="1.0",
        created="2026-01-01T00:00:00+00:00",
        dtype="bfloat16",
        tensor_parallel=1,
        kv_capacity_tokens=1000,
        block_size=16,
        max_num_batched_tokens=512,
        model=BatchTimeModel(k_c_s=0.001, b_c_s=0.0, k_m_s=0.0, b_m_s=0.01),
    )


class Engine:
    """Stands for what would import vLLM: the identity of the engine, profiling and the short model names."""

    def __init__(self) -> None:
        self.profiled: list[tuple[str, tuple[str, ...]]] = []

    def profile_engine(self, model: str, vllm_args: tuple[str, ...], **options: Any) -> SimpleNamespace:
        options["progress"]("measure", 0.5)
        self.profiled.append((model, tuple(vllm_args)))
        return SimpleNamespace(profile=a_profile(model), samples=None)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    stand_in = Engine()
    run = SimpleNamespace(
        engine_identity=identity,
        profile_engine=stand_in.profile_engine,
        given_arguments=lambda words: {word[2:].replace("-", "_"): "" for word in words if word.startswith("--")},
    )
    monkeypatch.setattr(arguments, "engine_fields", lambda: frozenset({"max_model_len", "model"}))
    for name in (MULTIPROC_ENV, "VLLM_API_KEY", "SLOS_SERVE_API_KEYS"):
        monkeypatch.delenv(name, raising=False)
    models = SimpleNamespace(resolve_model=lambda name, _: "/models/small" if name == "smollm2" else name)
    monkeypatch.setitem(sys.modules, "slos_serve.profiling.run", run)
    monkeypatch.setitem(sys.modules, "slos_serve.launch.cpu_model", models)
    monkeypatch.setenv("SLOS_SERVE_CACHE", str(tmp_path / "cache"))
    return stand_in


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.yaml"
    path.write_text("classes:\n  chat: {ttft_slowdown: 5, tpot_ms: 100}\n  code: {ttft_ms: 900, tpot_ms: 50}\n")
    return path


def replace_vllm(monkeypatch: pytest.MonkeyPatch, status: int) -> list[tuple[str, ...]]:
    commands: list[tuple[str, ...]] = []
    real = launch.server_command

    def command(*args: Any, **options: Any) -> list[str]:
        commands.append(tuple(real(*args, **options)))
        return [sys.executable, "-c", STAND_IN % status, "--port", str(options["endpoint"].port)]

    monkeypatch.setattr(launch, "server_command", command)
    return commands


def serve(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_measures_once_and_passes_vllm_its_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine, classes: Path
) -> None:
    commands = replace_vllm(monkeypatch, status=0)
    resolved = tmp_path / "serve.json"
    given = ("tiny", "--classes", classes, "--port", free_port(), "--max-model-len", "64", "-tp=1")
    status, output = serve(*given, "--json", resolved)
    assert status == 0, output
    assert engine.profiled == [("tiny", ("--port", str(given[4]), "--max-model-len", "64", "-tp=1"))]
    assert commands[0][3:5] == ("--model", "tiny")
    assert "-tp=1" in commands[0]
    assert "5 x the" in output
    assert "900 ms" in output
    record = json.loads(resolved.read_text())
    assert record["command"][-1] == str(given[4]) and record["served_model_name"] == "tiny"
    assert record["environment"]["SLOS_SERVE_CLASSES"] == str(classes)
    assert Path(record["environment"]["SLOS_SERVE_PROFILE"]).is_file()
    serve(*given[:4], free_port())
    assert len(engine.profiled) == 1, "the profile was kept"


def test_the_status_is_the_servers(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    replace_vllm(monkeypatch, status=3)
    assert serve("tiny", "--port", free_port())[0] == 3


def test_a_short_name_stays_the_name_of_the_model(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    for name, value in CPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # the command sets them too; this way they are gone after the test
    commands = replace_vllm(monkeypatch, status=0)
    told = [serve("smollm2", "--port", free_port(), *more)[1] for more in ((), ("--served-model-name", "mine"))]
    assert "slos-serve: smollm2 at " in told[0] and "slos-serve: mine at " in told[1]
    assert commands[0][4] == "/models/small"
    assert option_value(commands[0], "--served-model-name") == "smollm2"
    assert option_value(commands[1], "--served-model-name") == "mine"
    assert option_value(commands[0], "--max-num-seqs") == "64"


def test_a_profile_of_another_model_is_refused(tmp_path: Path, engine: Engine, classes: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(a_profile("other"), path)
    status, output = serve("tiny", "--classes", classes, "--profile", path)
    assert status == 2
    assert "measured on something else" in output
    assert not engine.profiled


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scheduler-cls", "x.Y"), "--scheduler-cls"),
        (("--port", "0"), "[1, 65535]"),
        (("--port", "http"), "[1, 65535]"),
        (("--classes", "no-such.yaml"), "no-such.yaml"),
        (("--profile", "no-such.json"), "no-such.json"),
    ],
)
def test_what_cannot_be_used_is_named(engine: Engine, words: tuple[str, ...], said: str) -> None:
    status, output = serve("tiny", *words)
    assert status == 2
    assert said in output


def test_a_broken_class_file_is_named_by_line(engine: Engine, classes: Path) -> None:
    classes.write_text("classes:\n  chat:\n    tpot: 5\n")
    status, output = serve("tiny", "--classes", classes)
    assert status == 2
    assert "classes.yaml:3" in output.replace(" ", "")


def test_an_interrupt_while_the_server_starts_ends_it(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    deaf = "import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(os.getppid(), 15); signal.pause()"
    monkeypatch.setattr(launch, "server_command", lambda *_, **__: [sys.executable, "-c", deaf])
    monkeypatch.setattr("slos_serve.cli.serve_run.INTERRUPTED_STOP_S", 0.1)
    assert serve("tiny", "--port", free_port())[0] == 128 + 15, "ended by SIGTERM, as shells say it"


FORWARDING = """
import os, select, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
if sys.argv[1]:
    os.open(sys.argv[1], os.O_RDWR)  # becomes the terminal of the session
from rich.console import Console
from slos_serve.cli.serve_run import _forwarded_signals
class Server:
    def send_signal(self, number):
        print("got", number, flush=True)
def line():
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        pass  # a signal just before a read that blocks would not be handled before the next line
    return sys.stdin.readline()
came = []
with _forwarded_signals(Server(), came) as reads_again:
    print("up", flush=True)
    if line():
        reads_again.set()
        print("ready", flush=True)
        line()
"""


@contextmanager
def forwarding(terminal: str = "") -> Iterator[tuple[int, Callable[[], str], Callable[[], None]]]:
    """What passes signals on, in a session of its own: its number, what it says next, and "the server is ready"."""
    command, pipe = [sys.executable, "-c", FORWARDING, terminal], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "up\n"

        def ready() -> None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ready\n"

        yield process.pid, process.stdout.readline, ready
        process.stdin.close()
    assert process.returncode == 0


def test_ctrl_c_and_sigterm_reach_the_server() -> None:
    with forwarding() as (pid, said, _):
        os.kill(pid, signal.SIGINT)
        assert said() == "got 2\n"
        os.kill(pid, signal.SIGTERM)
        assert said() == "got 15\n"


def test_a_hangup_asks_the_server_to_read_again_once_it_can() -> None:
    with forwarding() as (pid, said, ready):
        os.kill(pid, signal.SIGHUP)
        ready()
        os.kill(pid, signal.SIGHUP)
        assert said() == "got 1\n", "the first one came while the server started"
        os.kill(pid, signal.SIGTERM)
        assert said() == "got 15\n"


def test_the_server_ends_when_its_terminal_is_closed() -> None:
    ours, theirs = os.openpty()
    with forwarding(os.ttyname(theirs)) as (_, said, _):
        os.close(theirs)
        os.close(ours)
        assert said() == "got 15\n"


def test_replicas_are_handed_to_ray_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine, classes: Path
) -> None:
    plans: list[tuple[str, ServeConfig]] = []
    port = free_port()

    def command(module: str, path: str) -> list[str]:
        plans.append((module, ServeConfig.read(Path(path))))
        return [sys.executable, "-c", STAND_IN % 0, "--port", str(port)]

    monkeypatch.setattr(launch.ServerProcess, "python_command", staticmethod(command))
    monkeypatch.setattr("slos_serve.cli.serve.find_spec", lambda _: object())
    given = ("tiny", "--replicas", 3, "--order", "pack", "--classes", classes, "--port", port, "--max-model-len", "64")
    status, output = serve(*given, "--json", tmp_path / "serve.json")
    assert status == 0, output
    assert "3 replicas on Ray Serve" in output
    ((module, plan),) = plans
    assert module == "slos_serve.ray_serve.run"
    assert (plan.model, plan.replicas, plan.endpoint.port, plan.order) == ("tiny", 3, port, "pack")
    assert plan.plugin.classes_path == classes and plan.plugin.profile_path is not None
    assert list(plan.vllm_args) == ["--port", str(port), "--max-model-len", "64"]
    assert json.loads((tmp_path / "serve.json").read_text())["replicas"] == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [(("--replicas", "2"), "only where Ray Serve is installed"), (("--order", "best"), "'pack'")],
)
def test_replicas_that_cannot_be_served(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, given: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("slos_serve.cli.serve.find_spec", lambda _: None)
    status, output = serve("tiny", *given)
    assert status == 2 and said in output
