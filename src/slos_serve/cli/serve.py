"""``slos-serve serve``: vLLM's OpenAI-compatible server with the scheduler plug-in and the SLO middleware.

This file reads the command line and settles what is served; :mod:`slos_serve.cli.serve_run` serves it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from slos_serve.cli.printed import failure, output_file, progress_bar
from slos_serve.cli.serve_run import Launch, run
from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.core.redaction import redacted_text, secret_arguments, secrets_of
from slos_serve.files.engine_identity import describe
from slos_serve.files.profile_file import Profile, default_profile_path, find_profile, save_profile
from slos_serve.launch.cpu_engine import cpu_model_args, set_cpu_environment
from slos_serve.launch.endpoint import Endpoint
from slos_serve.launch.folders import prepare_folders
from slos_serve.launch.options import API_KEY, expanded, option_value, option_values, with_config_apart, without_option
from slos_serve.launch.serve_config import ServeConfig
from slos_serve.launch.server import START_TIMEOUT_S, with_key_in_environment
from slos_serve.routing.settings import Order
from slos_serve.vllm_plugin.config import ALLOW_MISMATCH_ENV, ENV_OF_FIELD, PluginConfig
from slos_serve.vllm_plugin.metrics import MULTIPROC_ENV

if TYPE_CHECKING:
    from slos_serve.files.engine_identity import EngineIdentity

USAGE_ERROR = 2
DEFAULT_ORDER = Order.PREFIX
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
        slo_page: whether there is a live page; ``None`` leaves it to the environment.
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
    slo_page: bool | None = None
    replicas: int | None = None
    order: Order = DEFAULT_ORDER
    startup_timeout_s: float = START_TIMEOUT_S


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
    slo_page: Annotated[
        bool | None, typer.Option("--slo-page/--no-slo-page", help="Show what the server does at /slo; default: yes.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Serve this many replicas with Ray Serve, routed by their promises.")
    ] = None,
    order: Annotated[Order, typer.Option(help="Which replica is asked first; with --replicas.")] = DEFAULT_ORDER,
    startup_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that the server may take to answer; raise it for large models.")
    ] = START_TIMEOUT_S,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the resolved configuration here.", callback=output_file)
    ] = None,
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
        slo_page=slo_page,
        replicas=replicas,
        order=order,
        startup_timeout_s=startup_timeout,
    )
    try:
        prepare_folders(os.environ, lambda said: console.print(said, markup=False, highlight=False, soft_wrap=True))
        status = run(console, _settle(console, given), json_file)
    except SlosServeError as error:
        secrets = [*secret_arguments(words), *secrets_of(os.environ)]
        raise failure(error, lambda said: redacted_text(said, secrets)) from None
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
        order=given.order,
        startup_timeout_s=given.startup_timeout_s,
    )
    return Launch(config, profile, {**environment, **_multiproc_dir(console)})


def _check(given: Given) -> None:
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
    fields["live_page"] = os.environ.get(ENV_OF_FIELD["live_page"]) if given.slo_page is None else given.slo_page
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
    with progress_bar(counted=False) as progress:
        task = progress.add_task("start", total=1.0)
        measured = profile_engine(
            model,
            vllm_args,
            duration_s=seconds,
            progress=lambda phase, part: progress.update(task, description=phase, completed=part),
        )
    path = default_profile_path(identity)
    save_profile(measured.profile, path, measured.samples)
    return path, measured.profile


def _warn_of_differences(console: Console, profile: Profile, engine: EngineIdentity, allow: bool) -> None:
    found = profile.check_matches(engine, allow_mismatch=allow)
    if found:
        said = f"warning: {describe(found)}"
        console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)
