"""``slos-serve serve`` once it is settled what to serve: print it, start the server, pass signals on, end with it."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from slos_serve.cli.promises import shown_first_token, shown_per_token, shown_whole
from slos_serve.core.redaction import redacted, redacted_arguments, redacted_text, secrets_of
from slos_serve.files.profile_file import Profile
from slos_serve.launch.options import expanded, option_value
from slos_serve.launch.serve_config import ServeConfig
from slos_serve.launch.server import STOP_TIMEOUT_S, Patience, ServerProcess, ServerStartError
from slos_serve.vllm_plugin.hangup import has_terminal

INTERRUPTED_STOP_S = 5.0
_KILLED = 128


@dataclass(frozen=True)
class Launch:
    """A settled start.

    Attributes:
        config: what is served; holds no secret.
        environment: variables for the server that may hold secrets.
        profile: the profile that is planned with.
    """

    config: ServeConfig
    profile: Profile
    environment: Mapping[str, str] = field(default_factory=dict)


def run(console: Console, launch: Launch, json_file: Path | None) -> int:
    """Serve until the server ends or a signal ends it; the server's exit status."""
    with tempfile.TemporaryDirectory(prefix="slos-serve-") as folder:
        return _run_in(console, launch, json_file, Path(folder))


def _run_in(console: Console, launch: Launch, json_file: Path | None, folder: Path) -> int:
    """As :func:`run`, with a folder for what the server is told."""
    config = launch.config
    ended_by: list[int] = []
    server = ServerProcess(
        config.model,
        config.vllm_args,
        plugin=config.plugin,
        environment=launch.environment,
        endpoint=config.endpoint,
        output="inherit",
        patience=Patience(config.startup_timeout_s, lambda _: _give_up_if(ended_by)),
        command=None if config.replicas is None else _replicas_command(config, folder / "config.json"),
    )
    interrupted_stop_s = INTERRUPTED_STOP_S if config.replicas is None else STOP_TIMEOUT_S
    _banner(console, launch)
    if json_file is not None:
        shown = json.dumps(_resolved(launch, server), indent=2)
        json_file.write_text(redacted_text(shown, _secrets(launch)) + "\n", encoding="utf-8")
    with _forwarded_signals(server, ended_by) as reads_again:
        stopped = None
        try:
            server.start()
            if not config.endpoint.headless:
                server.wait_ready()
                console.print(f"[bold green]ready[/] at {server.base_url}/v1", highlight=False)
                if config.replicas is None:
                    reads_again.set()
            server.wait()
        except ServerStartError:
            if not ended_by:
                raise
        finally:
            stopped = server.stop(interrupted_stop_s if ended_by else STOP_TIMEOUT_S)
    return exit_status(stopped, ended_by)


def exit_status(status: int | None, signals: Sequence[int]) -> int:
    """The server's own status; as shells have it, 128 + signal when it was killed.

    A server that was told to end and had to be killed counts as ended by the signal that it was told with.
    """
    if status is None:
        return _KILLED + signals[-1] if signals else 1
    if status >= 0:
        return status
    return _KILLED + (signals[-1] if signals else -status)


def _secrets(launch: Launch) -> list[str]:
    return secrets_of({**os.environ, **launch.environment})


def _replicas_command(config: ServeConfig, path: Path) -> list[str]:
    """Write what Ray Serve is to run; the command that runs it."""
    config.write(path)
    return ServerProcess.python_command("slos_serve.ray_serve.run", str(path))


def _give_up_if(ended_by: Sequence[int]) -> None:
    """vLLM ignores a signal that comes while it starts, so the wait ends here and the server is stopped."""
    if ended_by:
        raise ServerStartError("interrupted")


@contextmanager
def _forwarded_signals(server: ServerProcess, came: list[int]) -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM go to the server, which finishes by itself; the signals that came are added to ``came``.

    SIGHUP goes there as SIGTERM when the terminal is closed. Without a terminal it goes there as it is, for the class
    file to be read again, once the event that is yielded says that the server can; before that it does nothing.
    """
    reads_again, in_terminal = threading.Event(), has_terminal()

    def forward(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        server.send_signal(number)

    def hang_up(number: int, frame: FrameType | None) -> None:
        if in_terminal:
            forward(signal.SIGTERM, frame)
        elif reads_again.is_set():
            server.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield reads_again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def served_name(config: ServeConfig) -> str:
    """The name of the model that clients use: the first ``--served-model-name``, else what vLLM loads."""
    return option_value(expanded(config.vllm_args), "--served-model-name") or config.model


def _banner(console: Console, launch: Launch) -> None:
    config, classes = launch.config, launch.config.plugin.classes
    url = config.endpoint.base_url
    if config.endpoint.host is None and config.endpoint.uds is None and not config.endpoint.headless:
        url += " (every interface)"
    name = served_name(config)
    table = Table(title=f"slos-serve: {name} at {url}", title_justify="left")
    for column in ("class", "first token", "per output token", "as a whole", "weight", "longest stall"):
        table.add_column(column)
    for slo_class in classes:
        shown = f"{slo_class.name} (default)" if slo_class.name == classes.default else slo_class.name
        stall = f"{slo_class.max_stall_ms:g} ms"
        promised = shown_first_token(slo_class.slo), shown_per_token(slo_class), shown_whole(slo_class)
        table.add_row(shown, *promised, f"{slo_class.weight:g}", stall)
    if len(classes):
        console.print(table)
        if config.replicas is not None:
            console.print(f"{config.replicas} replicas on Ray Serve, asked in the order {config.order.value!r}")
    else:
        console.print(f"slos-serve: {name} at {url}, no class file: only requests' own numbers count")
    console.print(
        f"profile: {config.plugin.profile_path}\n         {launch.profile.device}, measured {launch.profile.created}",
        highlight=False,
        soft_wrap=True,
    )


def _resolved(launch: Launch, server: ServerProcess) -> dict[str, Any]:
    """The configuration as it may be kept and shared."""
    config, classes = launch.config, launch.config.plugin.classes
    return {
        "model": config.model,
        "served_model_name": served_name(config),
        "base_url": server.base_url,
        "command": redacted_arguments(server.command, _secrets(launch)),
        "environment": redacted({**config.plugin.environment(), **launch.environment}),
        "config": config.shown(),
        "replicas": config.replicas,
        "default_class": classes.default,
        "classes": {slo_class.name: asdict(slo_class) for slo_class in classes},
        "profile": {
            "path": str(config.plugin.profile_path),
            "device": launch.profile.device,
            "engine_version": launch.profile.engine_version,
            "created": launch.profile.created,
        },
        "python": sys.executable,
    }
