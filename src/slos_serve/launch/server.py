"""Start vLLM's OpenAI-compatible server, with the plug-in or stock, and stop it without leaving anything behind.

The server runs as ``python -m vllm.entrypoints.openai.api_server``, which takes the arguments of ``vllm serve`` and
works with every build of vLLM; ``vllm serve`` itself is started where only that acts on the arguments (``--headless``,
several API servers). The server gets a process group of its own: its workers end with it, and a Ctrl-C in the terminal
reaches it only through the process that started it. ``PROMETHEUS_MULTIPROC_DIR`` is a fresh folder for each start, as
Prometheus wants it, unless the operator names one; without it the scheduler's metrics would not show on ``/metrics``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from slos_serve.core.errors import SlosServeError
from slos_serve.core.redaction import redacted_text, secret_arguments, secrets_of
from slos_serve.files.cache_folder import temporary_root
from slos_serve.launch.endpoint import Endpoint, free_port
from slos_serve.launch.options import API_KEY, expanded, option_values, without_option
from slos_serve.vllm_plugin.config import PluginConfig, without_file_variables
from slos_serve.vllm_plugin.metrics import MULTIPROC_ENV

SCHEDULER_CLS = "slos_serve.vllm_plugin.SLOScheduler"
MIDDLEWARE = "slos_serve.vllm_plugin.SLOMiddleware"
API_KEY_ENV = "VLLM_API_KEY"
LOGGING_ENV = "VLLM_LOGGING_LEVEL"
# vLLM's server module ignores these; only its command line acts on them.
_COMMAND_LINE_ONLY = ("--headless", "--api-server-count", "-asc", "--data-parallel-supervisor-port")
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0
_REAP_S = 5.0
_POLL_S = 0.2
_TAIL_LINES = 40


class ServerStartError(SlosServeError):
    """The server ended or stayed silent before it was ready; the message shows the end of its log."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How a start is waited for.

    Attributes:
        timeout_s: how long the server may take to answer.
        on_wait: called with the seconds waited so far, a few times a second.
    """

    timeout_s: float = START_TIMEOUT_S
    on_wait: Callable[[float], None] | None = None


def server_command(
    model: str,
    vllm_args: Sequence[str] = (),
    *,
    endpoint: Endpoint,
    plugin: PluginConfig | None = None,
) -> list[str]:
    """Command line of the server; stock when ``plugin`` is ``None``.

    The endpoint's host and port replace those of ``vllm_args``; TLS and the rest of the HTTP side are in ``vllm_args``.
    """
    others = without_option(without_option(vllm_args, "--host"), "--port")
    words = expanded(others)
    if any(option_values(words, name) is not None for name in _COMMAND_LINE_ONLY):
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *others]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *others]
    if plugin is not None:
        command += ["--scheduler-cls", SCHEDULER_CLS, "--middleware", MIDDLEWARE]
    if endpoint.headless or endpoint.uds is not None:
        return command
    if endpoint.host is not None:
        command += ["--host", endpoint.host]
    return [*command, "--port", str(endpoint.port)]


def server_environment(
    base: Mapping[str, str],
    multiproc_dir: Path,
    plugin: PluginConfig | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Environment of the server: ``base`` without what another start may have left in it, then ours, then ``extra``."""
    told = {} if plugin is None else plugin.environment()
    return {**without_file_variables(base), MULTIPROC_ENV: str(multiproc_dir), **told, **(extra or {})}


def with_key_in_environment(vllm_args: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """A single ``--api-key`` moves into ``VLLM_API_KEY``, because every user of the machine can read command lines.

    Returns:
        The arguments and the variables. Several keys stay where they are: vLLM's variable holds one.
    """
    keys = option_values(vllm_args, API_KEY)
    if keys is None or len(keys) != 1:
        return tuple(vllm_args), {}
    return tuple(without_option(vllm_args, API_KEY, None)), {API_KEY_ENV: keys[0]}


class ServerProcess:
    """One server: ``with ServerProcess(model, ...) as server`` is entered when it answers ``/health``.

    Args:
        model: what vLLM takes as ``--model``.
        vllm_args: further arguments of vLLM's server.
        plugin: the plug-in's configuration; ``None`` starts stock vLLM.
        environment: variables over those of this process; a ``PROMETHEUS_MULTIPROC_DIR`` among them is used as it is.
        endpoint: where it listens; ``None`` picks a free port of the loopback interface.
        output: file for what it writes; ``"inherit"`` lets it write to this process's output; ``None`` keeps it in a
            temporary file until it stops.
        patience: how its start is waited for.
        command: what to start instead of vLLM's server; ``None`` starts that.
    """

    def __init__(
        self,
        model: str,
        vllm_args: Sequence[str] = (),
        *,
        plugin: PluginConfig | None = None,
        environment: Mapping[str, str] | None = None,
        endpoint: Endpoint | None = None,
        output: Path | Literal["inherit"] | None = None,
        patience: Patience | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.endpoint = endpoint or Endpoint(host="127.0.0.1", port=free_port())
        own = server_command(model, vllm_args, endpoint=self.endpoint, plugin=plugin)
        self.command = own if command is None else list(command)
        self._plugin = plugin
        self._extra = dict(environment or {})
        self._secrets = [*secret_arguments(self.command), *secrets_of({**os.environ, **self._extra})]
        self._inherit_output = output == "inherit"
        self._log_path = output if isinstance(output, Path) else None
        self._patience = patience or Patience()
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def python_command(module: str, *arguments: str) -> list[str]:
        """Command line of a module of this Python."""
        return [sys.executable, "-m", module, *arguments]

    @property
    def host(self) -> str | None:
        """Address it listens on."""
        return self.endpoint.host

    @property
    def port(self) -> int:
        """Port it listens on."""
        return self.endpoint.port

    @property
    def base_url(self) -> str:
        """URL that clients on this machine use, without ``/v1``."""
        return self.endpoint.base_url

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
        if self.endpoint.is_taken():
            raise ServerStartError(f"something already serves on {self.base_url}; choose another --port")
        self._folder = Path(tempfile.mkdtemp(prefix="slos-serve-", dir=temporary_root()))
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
        while not self.endpoint.answers():
            status = self._started.poll()
            waited_s = time.monotonic() - began_s
            if status is not None:
                raise ServerStartError(f"the server ended with status {status} before it was ready{self._tail()}")
            if waited_s > self._patience.timeout_s:
                raise ServerStartError(
                    f"the server was not ready within {waited_s:.0f} s; --startup-timeout gives it longer{self._tail()}"
                )
            if self._patience.on_wait is not None:
                self._patience.on_wait(waited_s)
            time.sleep(_POLL_S)

    def wait(self) -> int:
        """Wait until the server ends by itself or by a signal; its exit status."""
        return self._started.wait()

    def send_signal(self, number: int) -> None:
        """Pass a signal on to the API server, which ends its workers itself."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """End the server and every process of its group; safe to call twice.

        Returns:
            Its exit status, negative for the signal that ended it; ``None`` when it was not running.
        """
        status = None
        if self._process is not None:
            self.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                _kill_group(self._process.pid)
                status = self._process.wait()
                _reap_group(self._process.pid)
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        return status

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

    def _tail(self) -> str:
        tail = redacted_text(self.log_tail(), self._secrets)
        return f"; the end of its log:\n{tail}" if tail else ""


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _reap_group(group: int) -> None:
    """Collect the server's workers where they became children of this process (the first one of a container)."""
    until_s = time.monotonic() + _REAP_S
    with suppress(ChildProcessError):
        while time.monotonic() < until_s:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
