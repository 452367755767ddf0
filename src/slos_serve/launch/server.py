"""Start vLLM's OpenAI-compatible server, with the plug-in or stock, and stop it without leaving anything behind.

The server runs as ``python -m vllm.entrypoints.openai.api_server``, which takes the arguments of ``vllm serve`` and
works with every build of vLLM. It gets a process group of its own: its workers end with it, and a Ctrl-C in the
terminal reaches it only through whoever started it. ``PROMETHEUS_MULTIPROC_DIR`` is a fresh folder for each start, as
Prometheus wants it; without one the scheduler's metrics would not show on ``/metrics``.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from slos_serve.core.errors import SlosServeError
from slos_serve.vllm_plugin.metrics import MULTIPROC_ENV
from slos_serve.vllm_plugin.settings import (
    CLASSES_VARIABLE,
    EVENTS_VARIABLE,
    PROFILE_VARIABLE,
)

SCHEDULER_CLS = "slos_serve.vllm_plugin.SLOScheduler"
MIDDLEWARE = "slos_serve.vllm_plugin.SLOMiddleware"
# For a small model on a few cores; eager, so that no compilation delays the start.
_CPU_ENGINE_ARGS = (
    "--max-model-len",
    "4096",
    "--max-num-seqs",
    "64",
    "--enforce-eager",
)
_CPU_FACTS = Path("/proc/cpuinfo")
CPU_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
LOGGING_VARIABLE = "VLLM_LOGGING_LEVEL"
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0
_POLL_S = 0.2
_TAIL_LINES = 40


class ServerStartError(SlosServeError):
    """The server ended or stayed silent before it was ready; the message shows the end of its log."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """What the plug-in is started with.

    Attributes:
        classes: class file; ``None`` leaves only the numbers that requests bring.
        profile: batch-time profile; ``None`` leaves stock order.
        events: where the scheduler appends what happened, ``None`` for nowhere.
    """

    classes: Path | None = None
    profile: Path | None = None
    events: Path | None = None

    @property
    def paths(self) -> dict[str, str]:
        """The files by the names of the attributes; paths absolute, those that are not there left out."""
        files = {"classes": self.classes, "profile": self.profile, "events": self.events}
        return {name: str(path.resolve()) for name, path in files.items() if path is not None}

    @property
    def environment(self) -> dict[str, str]:
        """The variables that tell the server's processes; paths absolute."""
        files = {
            CLASSES_VARIABLE: self.classes,
            PROFILE_VARIABLE: self.profile,
            EVENTS_VARIABLE: self.events,
        }
        return {name: str(path.resolve()) for name, path in files.items() if path is not None}


def server_command(
    model: str,
    vllm_args: Sequence[str] = (),
    *,
    host: str,
    port: int,
    plugin: Plugin | None = None,
) -> list[str]:
    """Command line of the server; stock when ``plugin`` is ``None``.

    ``host`` and ``port`` replace those of ``vllm_args``.
    """
    others = without_option(without_option(vllm_args, "--host"), "--port")
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        *others,
    ]
    if plugin is not None:
        command += ["--scheduler-cls", SCHEDULER_CLS, "--middleware", MIDDLEWARE]
    return [*command, "--host", host, "--port", str(port)]


def server_environment(
    base: Mapping[str, str],
    multiproc_dir: Path,
    plugin: Plugin | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Environment of the server: ``base`` without what another start may have left in it, then ours, then ``extra``."""
    ours = {CLASSES_VARIABLE, PROFILE_VARIABLE, EVENTS_VARIABLE}
    kept = {name: value for name, value in base.items() if name not in ours}
    told = {} if plugin is None else plugin.environment
    return {**kept, MULTIPROC_ENV: str(multiproc_dir), **told, **(extra or {})}


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """Value of ``--name VALUE`` or ``--name=VALUE`` among arguments, the last one counting; ``None`` when absent."""
    found = None
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
        elif argument == name and index + 1 < len(arguments):
            found = arguments[index + 1]
    return found


def without_option(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments without ``--name VALUE`` and ``--name=VALUE``."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument == name:
            skip = not skip
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept


def cpu_engine_args(facts: Path = _CPU_FACTS) -> tuple[str, ...]:
    """vLLM's arguments for a small model on this machine's cores.

    A core without bfloat16 instructions computes in float32 several times faster than it emulates bfloat16.
    """
    flags = facts.read_text(encoding="utf-8").split() if facts.exists() else []
    dtype = "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"
    return ("--dtype", dtype, *_CPU_ENGINE_ARGS)


def cpu_model_args(given: Sequence[str], facts: Path = _CPU_FACTS) -> tuple[str, ...]:
    """``given``, before it what :func:`cpu_engine_args` says about options that are not given."""
    kept: list[str] = []
    defaults = cpu_engine_args(facts)
    for index, word in enumerate(defaults):
        if word.startswith("--") and not any(said == word or said.startswith(f"{word}=") for said in given):
            follows = defaults[index + 1 : index + 2]
            kept += [word, *(part for part in follows if not part.startswith("--"))]
    return (*kept, *given)


def cpu_engine_kwargs(facts: Path = _CPU_FACTS) -> dict[str, str | int | bool]:
    """What :func:`cpu_engine_args` says, as keyword arguments of vLLM's engine."""
    words = cpu_engine_args(facts)
    found: dict[str, str | int | bool] = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            follows = words[index + 1 : index + 2]
            value = follows[0] if follows and not follows[0].startswith("--") else True
            key = word.removeprefix("--").replace("-", "_")
            found[key] = int(value) if isinstance(value, str) and value.isdecimal() else value
    return found


def set_cpu_environment() -> None:
    """Set what is not set of :data:`CPU_ENVIRONMENT`; vLLM reads some of it as it is imported."""
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """One server: ``with ServerProcess(model, ...) as server`` is entered when it answers ``/health``.

    Args:
        model: what vLLM takes as ``--model``.
        vllm_args: further arguments of vLLM's server.
        plugin: the plug-in's files; ``None`` starts stock vLLM.
        environment: variables over those of this process.
        host, port: where it listens; port ``None`` picks a free one.
        log_path: file for its output; ``None`` keeps it in a temporary file until it stops.
        inherit_output: let it write to this process's output instead.
        start_timeout_s: how long it may take to answer.
        on_wait: called with the seconds waited so far, a few times a second, while it starts.
        command: what to start instead of vLLM's server; ``None`` starts that.
    """

    def __init__(
        self,
        model: str,
        vllm_args: Sequence[str] = (),
        *,
        plugin: Plugin | None = None,
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        log_path: Path | None = None,
        inherit_output: bool = False,
        start_timeout_s: float = START_TIMEOUT_S,
        on_wait: Callable[[float], None] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.host = host
        self.port = free_port() if port is None else port
        own = server_command(model, vllm_args, host=host, port=self.port, plugin=plugin)
        self.command = own if command is None else list(command)
        self._plugin = plugin
        self._extra = dict(environment or {})
        self._log_path = log_path
        self._inherit_output = inherit_output
        self._start_timeout_s = start_timeout_s
        self._on_wait = on_wait
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def python_command(module: str, *arguments: str) -> list[str]:
        """Command line of a module of this Python."""
        return [sys.executable, "-m", module, *arguments]

    @property
    def base_url(self) -> str:
        """URL that clients on this machine use, without ``/v1``."""
        return f"http://{self._reachable_host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the API server, which is also that of its process group."""
        return self._started.pid

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; returns at once.

        Raises:
            ServerStartError: another server listens on the port.
        """
        if _answers(self._reachable_host, self.port):
            raise ServerStartError(f"something already serves on {self.base_url}; choose another --port")
        self._folder = Path(tempfile.mkdtemp(prefix="slos-serve-"))
        multiproc_dir = self._folder / "prometheus"
        multiproc_dir.mkdir()
        if self._log_path is None:
            self._log_path = self._folder / "server.log"
        environment = server_environment(os.environ, multiproc_dir, self._plugin, self._extra)
        if self._inherit_output:
            self._process = subprocess.Popen(self.command, env=environment, process_group=0)
            return
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=environment,
                process_group=0,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self) -> None:
        """Return when ``/health`` answers.

        Raises:
            ServerStartError: it ended, or did not answer in time.
        """
        began_s = time.monotonic()
        while not _answers(self._reachable_host, self.port):
            status = self._started.poll()
            waited_s = time.monotonic() - began_s
            if status is not None:
                raise ServerStartError(f"the server ended with status {status} before it was ready{self._tail()}")
            if waited_s > self._start_timeout_s:
                raise ServerStartError(f"the server was not ready within {waited_s:.0f} s{self._tail()}")
            if self._on_wait is not None:
                self._on_wait(waited_s)
            time.sleep(_POLL_S)

    def wait(self) -> int:
        """Wait until the server ends by itself or by a signal; its exit status."""
        return self._started.wait()

    def send_signal(self, number: int) -> None:
        """Pass a signal on to the API server, which ends its workers itself."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the server and every process of its group; safe to call twice."""
        if self._process is not None:
            self.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                _kill_group(self._process.pid)
                self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """The end of what the server wrote; empty when it writes to this process's output or has stopped."""
        if self._inherit_output or self._log_path is None or not self._log_path.exists():
            return ""
        return "\n".join(self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise SlosServeError("the server is not running")
        return self._process

    @property
    def _reachable_host(self) -> str:
        return "127.0.0.1" if self.host in ("", "0.0.0.0", "::") else self.host

    def _tail(self) -> str:
        tail = self.log_tail()
        return f"; the end of its log:\n{tail}" if tail else ""


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
