"""``slos-serve serve``: vLLM's OpenAI-compatible server with the scheduler plug-in and the SLO middleware."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.core.redaction import redacted, redacted_arguments, redacted_text, secret_arguments, secrets_of
from slos_serve.core.slo import SLOClass
from slos_serve.files.profile_file import Profile, default_profile_path, find_profile, save_profile
from slos_serve.launch.cpu_engine import cpu_model_args, set_cpu_environment
from slos_serve.launch.endpoint import Endpoint
from slos_serve.launch.folders import prepare_folders
from slos_serve.launch.options import API_KEY, expanded, option_value, option_values, with_config_apart, without_option
from slos_serve.launch.serve_config import ServeConfig
from slos_serve.launch.server import (
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    Patience,
    ServerProcess,
    ServerStartError,
    with_key_in_environment,
)
from slos_serve.routing.settings import Order
from slos_serve.vllm_plugin.config import ALLOW_MISMATCH_ENV, ENV_OF_FIELD, PluginConfig
from slos_serve.vllm_plugin.metrics import MULTIPROC_ENV

if TYPE_CHECKING:
    from slos_serve.files.engine_identity import EngineIdentity

USAGE_ERROR = 2
INTERRUPTED_STOP_S = 5.0
_KILLED = 128
DEFAULT_ORDER = Order.PREFIX.value
_OURS = ("--scheduler-cls", "--model")
# Settings without an option of their own; read from the environment and handed on.
_FROM_ENVIRONMENT = (
    *("plan_limit_ms", "ttft_margin_ms", "fault_limit", "max_body_mib", "custom_numbers"),
    *("publish_to", "publish_every_ms"),
)


@dataclass(frozen=True)
class Given:
    """What the command line says, before anything is looked up.

    Attributes:
        model: what vLLM serves.
        words: options that are not this command's.
        classes, profile, events: files.
        profile_seconds: how long to measure when there is no profile.
        allow_profile_mismatch: plan with a profile of something else.
        replicas, order: for Ray Serve.
        startup_timeout_s: how long the server may take to answer.
    """

    model: str
    words: tuple[str, ...]
    classes: Path | None = None
    profile: Path | None = None
    events: Path | None = None
    profile_seconds: float = 60.0
    allow_profile_mismatch: bool = False
    replicas: int | None = None
    order: str = DEFAULT_ORDER
    startup_timeout_s: float = START_TIMEOUT_S


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


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="What vLLM serves: a hub name or a folder; 'smollm2' needs no download.")
    ],
    classes: Annotated[Path | None, typer.Option(help="YAML file with the classes of requests.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Batch-time profile; default: the kept one of this engine, measured if missing.")
    ] = None,
    profile_seconds: Annotated[float, typer.Option(help="How long to measure when there is no profile.")] = 60.0,
    allow_profile_mismatch: Annotated[
        bool, typer.Option("--allow-profile-mismatch", help="Plan with a profile that was measured on something else.")
    ] = False,
    events: Annotated[
        Path | None, typer.Option(help="Append what happens to each request and step as JSON lines.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Serve this many replicas with Ray Serve, routed by their promises.")
    ] = None,
    order: Annotated[
        str, typer.Option(help="Which replica is asked first: prefix, spread or pack; with --replicas.")
    ] = DEFAULT_ORDER,
    startup_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that the server may take to answer; raise it for large models.")
    ] = START_TIMEOUT_S,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the resolved configuration here.")] = None,
) -> None:
    """Serve MODEL so that each request keeps the latency promises of its class.

    Options that are not listed here go to vLLM as they are: slos-serve serve MODEL --max-model-len 8192
    """
    console = Console(stderr=True)
    words = tuple(with_config_apart(context.args))
    given = Given(
        model=model,
        words=words,
        classes=classes,
        profile=profile,
        events=events,
        profile_seconds=profile_seconds,
        allow_profile_mismatch=allow_profile_mismatch,
        replicas=replicas,
        order=order,
        startup_timeout_s=startup_timeout,
    )
    try:
        prepare_folders(os.environ, lambda said: console.print(said, markup=False, highlight=False, soft_wrap=True))
        status = _run(console, _settle(console, given), json_file)
    except SlosServeError as error:
        said = redacted_text(str(error), [*secret_arguments(words), *secrets_of(os.environ)]).replace("[", r"\[")
        console.print(f"[bold red]slos-serve serve:[/] {said}", highlight=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, ServerStartError) else USAGE_ERROR) from None
    raise typer.Exit(status)


def _settle(console: Console, given: Given) -> Launch:
    _check(given)
    plugin = _plugin(given)
    endpoint = Endpoint.of_arguments(given.words)
    _ = plugin.classes  # refused before anything takes long
    path, words = _model(given.model, given.words, lambda said: console.print(said, markup=False))
    words, environment = _without_keys(words, given.replicas is not None)
    if given.replicas is not None:
        _check_replica_arguments(words)
    profile_path, profile = _profile(console, path, words, plugin, given.profile_seconds)
    plugin = plugin.with_profile(profile_path)
    config = ServeConfig(
        model=path,
        vllm_args=words,
        endpoint=endpoint,
        plugin=plugin,
        replicas=given.replicas,
        order=Order(given.order),
        startup_timeout_s=given.startup_timeout_s,
    )
    return Launch(config, profile, {**environment, **_multiproc_dir(console)})


def _check(given: Given) -> None:
    if given.order not in list(Order):
        raise InvalidFieldError("--order", given.order, f"one of {[known.value for known in Order]}")
    for name in _OURS:
        if option_value(given.words, name) is not None:
            raise InvalidFieldError(name, option_value(given.words, name), f"not here: 'serve MODEL' sets {name}")
    if given.replicas is None:
        return
    if find_spec("ray") is None:
        raise InvalidFieldError(
            "--replicas", given.replicas, "only where Ray Serve is installed: pip install 'slos-serve[ray]'"
        )
    from slos_serve.ray_serve.arguments import refuse_early

    refuse_early(expanded(given.words))


def _check_replica_arguments(words: Sequence[str]) -> None:
    """Refuse now what the replicas would refuse after Ray has started."""
    from slos_serve.profiling.run import given_arguments
    from slos_serve.ray_serve.arguments import ENDPOINT_ARGUMENTS, engine_arguments

    given = given_arguments(words)
    engine_arguments({name: value for name, value in given.items() if name not in ENDPOINT_ARGUMENTS})


def _plugin(given: Given) -> PluginConfig:
    fields: dict[str, Any] = {name: os.environ.get(ENV_OF_FIELD[name]) for name in _FROM_ENVIRONMENT}
    fields |= {"classes_path": given.classes, "profile_path": given.profile, "events_path": given.events}
    fields["allow_profile_mismatch"] = given.allow_profile_mismatch or os.environ.get(ALLOW_MISMATCH_ENV)
    return PluginConfig.of(fields, ENV_OF_FIELD)


def _without_keys(words: tuple[str, ...], replicas: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """API keys leave the command line where they can; the variables that carry them instead.

    With replicas the words are those of ``--config FILE`` too, because Ray's process reads no such file.
    """
    if not replicas:
        return with_key_in_environment(words)
    from slos_serve.ray_serve.api_keys import API_KEYS_ENV

    words = tuple(expanded(words))
    keys = option_values(words, API_KEY) or []
    environment = {API_KEYS_ENV: json.dumps(keys)} if keys else {}
    return tuple(without_option(words, API_KEY, None)), environment


def _multiproc_dir(console: Console) -> dict[str, str]:
    """The operator's own Prometheus folder, if there is one; it must be made and should be empty."""
    given = os.environ.get(MULTIPROC_ENV)
    if not given:
        return {}
    folder = Path(given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        left = any(folder.iterdir())
    except OSError as fault:
        raise InvalidFieldError(MULTIPROC_ENV, given, f"a folder that can be written ({fault.strerror})") from fault
    if left:
        console.print(
            f"[yellow]warning:[/yellow] {MULTIPROC_ENV}={given} is not empty: /metrics adds numbers of an earlier run",
            highlight=False,
            soft_wrap=True,
        )
    return {MULTIPROC_ENV: given}


def _model(model: str, given: tuple[str, ...], announce: Callable[[str], None]) -> tuple[str, tuple[str, ...]]:
    """What vLLM loads; a short name stays the name that clients use."""
    from slos_serve.launch.cpu_model import resolve_model

    path = resolve_model(model, announce)
    if path == model:
        return path, given
    set_cpu_environment()
    said = expanded(given)
    defaults = cpu_model_args(said)[: -len(said) or None]
    named = option_value(said, "--served-model-name") is not None
    return path, (*defaults, *given, *(() if named else ("--served-model-name", model)))


def _profile(
    console: Console, model: str, vllm_args: Sequence[str], plugin: PluginConfig, seconds: float
) -> tuple[Path, Profile]:
    """The profile to plan with: the one given, the nearest one kept, or a new one.

    Raises:
        ProfileMismatchError: the one given was measured on something else.
    """
    from slos_serve.profiling.run import engine_identity, profile_engine

    given = plugin.profile
    with console.status("reading the model's configuration"):
        identity = engine_identity(model, vllm_args)
    if given is not None and plugin.profile_path is not None:
        _warn_of_differences(console, given, identity, plugin.allow_profile_mismatch)
        return plugin.profile_path, given
    kept = find_profile(identity)
    if kept is not None:
        _warn_of_differences(console, kept[1], identity, allow=False)
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
    path = default_profile_path(identity)
    save_profile(run.profile, path, run.samples)
    return path, run.profile


def _warn_of_differences(console: Console, profile: Profile, engine: EngineIdentity, allow: bool) -> None:
    for difference in profile.check_matches(engine, allow_mismatch=allow):
        kind = "the profile was measured on something else" if difference.far else "the profile fits approximately"
        console.print(f"warning: {kind}: {difference}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:10}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _run(console: Console, launch: Launch, json_file: Path | None) -> int:
    """Serve until the server ends or a signal ends it; the server's exit status."""
    with tempfile.TemporaryDirectory(prefix="slos-serve-") as folder:
        return _run_in(console, launch, json_file, Path(folder))


def _run_in(console: Console, launch: Launch, json_file: Path | None, folder: Path) -> int:
    """As :func:`_run`, with a folder for what the server is told."""
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
    with _forwarded_signals(server, ended_by):
        stopped = None
        try:
            server.start()
            if not config.endpoint.headless:
                server.wait_ready()
                console.print(f"[bold green]ready[/] at {server.base_url}/v1", highlight=False)
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


def _banner(console: Console, launch: Launch) -> None:
    config, classes = launch.config, launch.config.plugin.classes
    url = config.endpoint.base_url
    if config.endpoint.host is None and config.endpoint.uds is None and not config.endpoint.headless:
        url += " (every interface)"
    table = Table(title=f"slos-serve: {config.model} at {url}", title_justify="left")
    for column in ("class", "first token", "per output token", "weight", "longest stall"):
        table.add_column(column)
    for slo_class in classes:
        name = f"{slo_class.name} (default)" if slo_class.name == classes.default else slo_class.name
        stall = f"{slo_class.max_stall_ms:g} ms"
        table.add_row(name, _first_token(slo_class), _per_token(slo_class), f"{slo_class.weight:g}", stall)
    if len(classes):
        console.print(table)
        if config.replicas is not None:
            console.print(f"{config.replicas} replicas on Ray Serve, asked in the order {config.order.value!r}")
    else:
        console.print(f"slos-serve: {config.model} at {url}, no class file: only requests' own numbers count")
    console.print(
        f"profile: {config.plugin.profile_path}\n         {launch.profile.device}, measured {launch.profile.created}",
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


def _resolved(launch: Launch, server: ServerProcess) -> dict[str, Any]:
    """The configuration as it may be kept and shared."""
    config, classes = launch.config, launch.config.plugin.classes
    return {
        "model": config.model,
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
