"""``slos-serve serve``: vLLM's OpenAI-compatible server with the scheduler plug-in and the SLO middleware."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.core.slo import ClassSet, SLOClass
from slos_serve.files.class_file import load_classes
from slos_serve.files.profile_file import Profile, default_profile_path, find_profile, load_profile, save_profile
from slos_serve.launch.server import (
    STOP_TIMEOUT_S,
    Plugin,
    ServerProcess,
    ServerStartError,
    cpu_model_args,
    option_value,
    set_cpu_environment,
)
from slos_serve.routing.settings import Order

DEFAULT_PORT = 8000
DEFAULT_HOST = "127.0.0.1"
USAGE_ERROR = 2
INTERRUPTED_STOP_S = 5.0
DEFAULT_ORDER = Order.PREFIX.value
# How typer must register the command for vLLM's arguments to pass.
_OURS = ("--scheduler-cls", "--model")


@dataclass(frozen=True)
class ServePlan:
    """Everything that is settled before the server starts."""

    model: str
    vllm_args: tuple[str, ...]
    host: str
    port: int
    classes: ClassSet
    plugin: Plugin
    profile: Profile
    replicas: int | None = None
    order: str = DEFAULT_ORDER


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="What vLLM serves: a hub name or a folder; 'smollm2' needs no download.")
    ],
    classes: Annotated[Path | None, typer.Option(help="YAML file with the classes of requests.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Batch-time profile; default: the kept one of this model, measured if missing.")
    ] = None,
    profile_seconds: Annotated[float, typer.Option(help="How long to measure when there is no profile.")] = 60.0,
    events: Annotated[
        Path | None, typer.Option(help="Append what happens to each request and step as JSON lines.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Serve this many replicas with Ray Serve, routed by their promises.")
    ] = None,
    order: Annotated[
        str, typer.Option(help="Which replica is asked first: prefix, spread or pack; with --replicas.")
    ] = DEFAULT_ORDER,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the resolved configuration here.")] = None,
) -> None:
    """Serve MODEL so that each request keeps the latency promises of its class.

    Options that are not listed here go to vLLM as they are: slos-serve serve MODEL --max-model-len 8192
    """
    console = Console(stderr=True)
    try:
        _check_replicas(replicas, order)
        plan = _settle(console, model, tuple(context.args), Plugin(classes, profile, events), profile_seconds)
        plan = replace(plan, replicas=replicas, order=order)
        status = _run(console, plan, json_file)
    except SlosServeError as error:
        console.print(f"[bold red]slos-serve serve:[/] {_escaped(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, ServerStartError) else USAGE_ERROR) from None
    raise typer.Exit(status)


def _check_replicas(replicas: int | None, order: str) -> None:
    if order not in list(Order):
        raise InvalidFieldError("--order", order, f"one of {[known.value for known in Order]}")
    if replicas is not None and find_spec("ray") is None:
        raise InvalidFieldError(
            "--replicas", replicas, "only where Ray Serve is installed: pip install 'slos-serve[ray]'"
        )


def _settle(console: Console, model: str, given: tuple[str, ...], plugin: Plugin, profile_seconds: float) -> ServePlan:
    for name in _OURS:
        if option_value(given, name) is not None:
            raise InvalidFieldError(name, option_value(given, name), f"not here: 'serve MODEL' sets {name}")
    port = _port(option_value(given, "--port"))
    class_set = ClassSet() if plugin.classes is None else load_classes(plugin.classes)
    path, vllm_args = _model(model, given, console.print)
    profile_path, profile = _profile(console, path, vllm_args, plugin.profile, profile_seconds)
    return ServePlan(
        model=path,
        vllm_args=vllm_args,
        host=option_value(given, "--host") or DEFAULT_HOST,
        port=port,
        classes=class_set,
        plugin=Plugin(plugin.classes, profile_path, plugin.events),
        profile=profile,
    )


def _port(text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise InvalidFieldError("--port", text, "a whole number in [1, 65535]")
    return int(text)


def _model(model: str, given: tuple[str, ...], announce: Callable[[str], None]) -> tuple[str, tuple[str, ...]]:
    """What vLLM loads; a short name stays the name that clients use."""
    from slos_serve.launch.cpu_model import resolve_model

    path = resolve_model(model, announce)
    if path == model:
        return path, given
    set_cpu_environment()
    arguments = cpu_model_args(given)
    named = option_value(given, "--served-model-name") is not None
    return path, arguments if named else (*arguments, "--served-model-name", model)


def _profile(
    console: Console, model: str, vllm_args: Sequence[str], given: Path | None, seconds: float
) -> tuple[Path, Profile]:
    """The profile to plan with: the one given, the one kept, or a new one.

    Raises:
        ProfileMismatchError: the one given was measured on something else.
    """
    from slos_serve.profiling.run import engine_identity, profile_engine

    loaded = None if given is None else load_profile(given)
    with console.status("reading the model's configuration"):
        identity = asdict(engine_identity(model, vllm_args))
    if given is not None and loaded is not None:
        loaded.check_matches(model=model, **identity)
        return given, loaded
    kept = find_profile(model, **identity)
    if kept is not None:
        return kept
    console.print(f"no profile of this model on this device yet: measuring for {seconds:g} s (once)")
    with _progress(console) as progress:
        task = progress.add_task("start", total=1.0)
        run = profile_engine(
            model,
            vllm_args,
            duration_s=seconds,
            progress=lambda phase, part: progress.update(task, description=phase, completed=part),
        )
    path = default_profile_path(model, **identity)
    save_profile(run.profile, path, run.samples)
    return path, run.profile


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:10}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _run(console: Console, plan: ServePlan, json_file: Path | None) -> int:
    """Serve until the server ends or a signal ends it; its exit status, 0 after a signal."""
    with tempfile.TemporaryDirectory(prefix="slos-serve-") as folder:
        return _run_in(console, plan, json_file, Path(folder))


def _run_in(console: Console, plan: ServePlan, json_file: Path | None, folder: Path) -> int:
    """As :func:`_run`, with a folder for what the server is told."""
    ended_by: list[int] = []
    server = ServerProcess(
        plan.model,
        plan.vllm_args,
        plugin=plan.plugin,
        host=plan.host,
        port=plan.port,
        inherit_output=True,
        on_wait=lambda _: _give_up_if(ended_by),
        command=None if plan.replicas is None else _replicas_command(plan, folder / "plan.json"),
    )
    interrupted_stop_s = INTERRUPTED_STOP_S if plan.replicas is None else STOP_TIMEOUT_S
    _banner(console, plan, server.base_url)
    if json_file is not None:
        json_file.write_text(json.dumps(_resolved(plan, server), indent=2) + "\n", encoding="utf-8")
    with _forwarded_signals(server, ended_by):
        try:
            server.start()
            server.wait_ready()
            console.print(f"[bold green]ready[/] at {server.base_url}/v1", highlight=False)
            status = server.wait()
        except ServerStartError:
            if not ended_by:
                raise
            status = 0
        finally:
            server.stop(interrupted_stop_s if ended_by else STOP_TIMEOUT_S)
    return 0 if ended_by else status


def _replicas_command(plan: ServePlan, path: Path) -> list[str]:
    """Write what Ray Serve is to run; the command that runs it."""
    from slos_serve.ray_serve.run import ReplicaPlan

    assert plan.replicas is not None
    files = plan.plugin.paths
    ReplicaPlan(
        model=plan.model,
        replicas=plan.replicas,
        host=plan.host,
        port=plan.port,
        vllm_args=plan.vllm_args,
        order=plan.order,
        **files,
    ).write(path)
    return ServerProcess.python_command("slos_serve.ray_serve.run", str(path))


def _give_up_if(ended_by: Sequence[int]) -> None:
    """vLLM ignores a signal that comes while it starts, so the wait ends here and the server is stopped."""
    if ended_by:
        raise ServerStartError("interrupted")


@contextmanager
def _forwarded_signals(server: ServerProcess, came: list[int]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to the server, which finishes by itself; the signals that came are added to ``came``."""

    def forward(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        server.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _banner(console: Console, plan: ServePlan, url: str) -> None:
    table = Table(title=f"slos-serve: {plan.model} at {url}", title_justify="left")
    for column in ("class", "first token", "per output token", "weight", "longest stall"):
        table.add_column(column)
    for slo_class in plan.classes:
        name = f"{slo_class.name} (default)" if slo_class.name == plan.classes.default else slo_class.name
        stall = f"{slo_class.max_stall_ms:g} ms"
        table.add_row(name, _first_token(slo_class), _per_token(slo_class), f"{slo_class.weight:g}", stall)
    if len(plan.classes):
        console.print(table)
        if plan.replicas is not None:
            console.print(f"{plan.replicas} replicas on Ray Serve, asked in the order {plan.order!r}")
    else:
        console.print(f"slos-serve: {plan.model} at {url}, no class file: only requests' own numbers count")
    console.print(
        f"profile: {plan.plugin.profile}\n         {plan.profile.device}, measured {plan.profile.created}",
        highlight=False,
        soft_wrap=True,
    )


def _first_token(slo_class: SLOClass) -> str:
    slo = slo_class.slo
    if slo.ttft_ms is not None:
        return f"{slo.ttft_ms:g} ms"
    if slo.ttft_slowdown is not None:
        return f"{slo.ttft_slowdown:g} x zero load, at least {slo.ttft_floor_ms:g} ms"
    return "no promise"


def _per_token(slo_class: SLOClass) -> str:
    told = ["no promise" if stage.slo.tpot_ms is None else f"{stage.slo.tpot_ms:g} ms" for stage in slo_class.stages]
    return ", then ".join(told)


def _resolved(plan: ServePlan, server: ServerProcess) -> dict[str, Any]:
    return {
        "model": plan.model,
        "base_url": server.base_url,
        "command": server.command,
        "environment": plan.plugin.environment,
        "replicas": plan.replicas,
        "default_class": plan.classes.default,
        "classes": {slo_class.name: asdict(slo_class) for slo_class in plan.classes},
        "profile": {
            "path": str(plan.plugin.profile),
            "device": plan.profile.device,
            "engine_version": plan.profile.engine_version,
            "created": plan.profile.created,
        },
        "python": sys.executable,
    }


def _escaped(error: Exception) -> str:
    return str(error).replace("[", r"\[")
