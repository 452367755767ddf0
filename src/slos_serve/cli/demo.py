"""``slos-serve demo``: stock vLLM beside vLLM with the plug-in, on this machine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from slos_serve.cli.printed import failure, interrupted, output_file, progress_bar, say, stdout_console
from slos_serve.cli.sim_options import JsonFile
from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.launch.folders import prepare_folders

if TYPE_CHECKING:
    from slos_serve.bench.demo import EngineSetup, Told
    from slos_serve.bench.demo_plan import DemoPlan, DemoSettings
    from slos_serve.bench.demo_report import SideRun
    from slos_serve.files.engine_identity import EngineIdentity
    from slos_serve.files.profile_file import Profile

PROFILE_SECONDS = 60.0


class Story(StrEnum):
    """What the demo sends."""

    STREAMS = "streams"
    AGENTS = "agents"


# Tasks take their time: a burst has to last until those of stock vLLM come late.
BURST_SECONDS = {Story.STREAMS: 24.0, Story.AGENTS: 40.0}


def demo(
    model: Annotated[str, typer.Option(help="What vLLM loads; 'smollm2' needs no download.")] = "smollm2",
    story: Annotated[
        Story, typer.Option(help="What is sent: streams of three classes, or agents' tasks, JSON answers and a chat.")
    ] = Story.STREAMS,
    json_file: JsonFile = None,
    png: Annotated[Path | None, typer.Option(help="Write the chart here.", callback=output_file)] = None,
    profile: Annotated[Path | None, typer.Option(help="Batch-time profile instead of the cached one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the requests.")] = 0,
    calm_seconds: Annotated[float, typer.Option(min=1, help="How long requests arrive in the calm phase.")] = 28.0,
    burst_seconds: Annotated[
        float | None, typer.Option(min=1, help="How long requests arrive in the burst; 24, of agents 40.")
    ] = None,
    burst_load: Annotated[float, typer.Option(min=0.1, help="Load of the burst, in parts of the capacity.")] = 1.7,
    weaker: Annotated[
        bool, typer.Option("--weaker", help="Give each class of streams a weaker promise, asked for in its place.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Write each side's requests with their token times to this folder, for replay.")
    ] = None,
) -> None:
    """Send the same requests to stock vLLM and to vLLM with SLOs-Serve and count the latency promises kept.

    Takes about six minutes on two cores, four more the first time for the model and its profile.
    """
    from slos_serve.bench.demo_plan import DemoSettings
    from slos_serve.bench.demo_report import claims, demo_json, demo_table

    if story is Story.AGENTS:
        for given, name in ((png, "--png"), (record, "--record"), (weaker or None, "--weaker")):
            if given is not None:
                raise failure(InvalidFieldError(name, str(given), "only with --story streams"))
    console = Console(stderr=True)
    prepare_folders(os.environ, lambda said: console.print(said, markup=False, soft_wrap=True))
    folder = Path(tempfile.mkdtemp(prefix="slos-serve-demo-"))
    began_s = time.monotonic()
    try:
        setup, found = _engine(console, model, profile)
        burst_s = BURST_SECONDS[story] if burst_seconds is None else burst_seconds
        settings = DemoSettings(seed=seed, calm_s=calm_seconds, burst_s=burst_s, burst_load=burst_load, weaker=weaker)
        if story is Story.AGENTS:
            told, result = _agents(console, setup, found, settings, folder)
            _say(told)
            _write_json(result, json_file)
            shutil.rmtree(folder, ignore_errors=True)
            return
        plan, sides = _run(console, setup, settings, folder)
        result = demo_json(sides, _setup_json(setup, found, plan, time.monotonic() - began_s))
    except SlosServeError as error:
        end = failure(error)
        say(f"The servers' logs are in {folder}")
        raise end from None
    except KeyboardInterrupt:
        raise interrupted() from None
    _say((demo_table(result), claims(result)))
    _write(result, sides, plan, setup, json_file, png)
    if record is not None:
        _record(record, sides, plan, setup, result["setup"])
    shutil.rmtree(folder, ignore_errors=True)


def _say(told: tuple[Table, list[tuple[str, bool]]]) -> None:
    """Print a table and its claims."""
    out, (table, claims) = stdout_console(), told
    out.print(table)
    for text, held in claims:
        out.print(f"[green]yes[/] {text}" if held else f"[red]no [/] {text}", highlight=False, soft_wrap=True)


def _agents(
    console: Console, setup: EngineSetup, profile: Profile, settings: DemoSettings, folder: Path
) -> tuple[tuple[Table, list[tuple[str, bool]]], dict[str, Any]]:
    """The story of agents: its table with the claims, and its JSON."""
    from slos_serve.bench.agents_plan import agents_yaml, plan_agents
    from slos_serve.bench.agents_report import agents_claims, agents_json, agents_table
    from slos_serve.bench.demo import send_to_both

    began_s = time.monotonic()
    plan = plan_agents(setup.profile_model, settings)
    classes_path = folder / "classes.yaml"
    text = agents_yaml(plan.classes)
    classes_path.write_text(text, encoding="utf-8")
    console.print(f"This engine carries at most {plan.capacity_per_s:.2f} chats, answers and tasks a second. Promises:")
    console.print(text.rstrip(), markup=False, highlight=False)
    with progress_bar() as progress:
        task = progress.add_task("starting both servers", total=None)
        loads, _ = send_to_both(setup, plan, folder, classes=classes_path, told=_told(progress, task))
    facts = {**_setup_json(setup, profile, plan, time.monotonic() - began_s), "class_file": text}
    result = agents_json(loads, plan, setup.profile_model, facts)
    return (agents_table(result), agents_claims(result)), result


def _engine(console: Console, model: str, given: Path | None) -> tuple[EngineSetup, Profile]:
    """The model, how it is started, and its profile: the one given, the cached one, or a new one."""
    from slos_serve.launch.cpu_engine import CPU_ENVIRONMENT, cpu_engine_args, set_cpu_environment
    from slos_serve.launch.server import LOGGING_ENV

    # The servers write to their logs; what is said while profiling would end up between the progress bars.
    server_logging = os.environ.get(LOGGING_ENV, "INFO")
    os.environ.setdefault(LOGGING_ENV, "ERROR")
    set_cpu_environment()  # what is profiled must be the engine that is served
    with console.status("loading vLLM"):
        from slos_serve.bench.demo import EngineSetup
        from slos_serve.files.engine_identity import describe
        from slos_serve.files.profile_file import default_profile_path, find_profile, load_profile, save_profile
        from slos_serve.launch.cpu_model import resolve_model
        from slos_serve.profiling.run import profile_engine
    with console.status(f"preparing the model '{model}' (converted once, then cached)"):
        path = str(resolve_model(model))
    identity = _identity(path)
    with console.status("compiling the planner (once)"):
        # A server compiles what it lacks beside its first requests, which would disturb both sides here.
        from slos_serve.routing.warm_up import warm_up_routing

        warm_up_routing()
    kept = (given, load_profile(given)) if given is not None else find_profile(identity)
    if kept is None:
        console.print(f"No profile of this model on this machine yet: measuring for {PROFILE_SECONDS:g} s, once.")
        with progress_bar() as progress:
            task = progress.add_task("starting the engine", total=None)
            run = profile_engine(
                path,
                cpu_engine_args(),
                duration_s=PROFILE_SECONDS,
                progress=lambda phase, part: progress.update(task, description=phase, total=1.0, completed=part),
            )
        kept = (default_profile_path(identity), run.profile)
        save_profile(run.profile, kept[0], run.samples)
    profile_path, profile = kept
    if found := profile.check_matches(identity):
        console.print(f"warning: {describe(found)}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"profile: {profile_path} ({profile.device}, measured {profile.created})", highlight=False)
    environment = {**CPU_ENVIRONMENT, LOGGING_ENV: server_logging}
    return EngineSetup(path, cpu_engine_args(), environment, profile_path, profile.model), profile


def _identity(model: str) -> EngineIdentity:
    """What a profile of this engine must have been measured on."""
    from slos_serve.launch.cpu_engine import cpu_engine_args
    from slos_serve.profiling.run import engine_identity

    return engine_identity(model, cpu_engine_args())


def _run(
    console: Console, setup: EngineSetup, settings: DemoSettings, folder: Path
) -> tuple[DemoPlan, dict[str, SideRun]]:
    from slos_serve.bench.demo import run_sides
    from slos_serve.bench.demo_plan import classes_yaml, plan_demo

    plan = plan_demo(setup.profile_model, settings)
    classes_path = folder / "classes.yaml"
    classes_path.write_text(classes_yaml(plan.classes), encoding="utf-8")
    _announce(console, plan)
    with progress_bar() as progress:
        task = progress.add_task("starting both servers", total=None)
        sides = run_sides(setup, plan, folder, classes=classes_path, told=_told(progress, task))
    return plan, sides


def _told(progress: Progress, task: TaskID) -> Told:
    from slos_serve.bench.demo import Told
    from slos_serve.bench.demo_report import SIDE_TITLES

    names = {"warm": "warm-up", "calm": "calm phase", "burst": "burst and what it leaves behind"}
    return Told(
        phase=lambda side, name, count: progress.update(
            task, description=f"{SIDE_TITLES[side]}: {names[name]}", total=count, completed=0, refresh=True
        ),
        answered=lambda _response: progress.advance(task),
    )


def _announce(console: Console, plan: DemoPlan) -> None:
    step_ms, settings = 1000.0 * plan.decode_step_s, plan.settings
    console.print(
        f"This engine decodes {settings.decode_batch} requests in {step_ms:.0f} ms and carries at most "
        f"{plan.capacity_per_s:.2f} requests/s of the demo's mix. Promises, scaled from that:",
        highlight=False,
    )
    for slo_class in plan.classes:
        slo = slo_class.slo
        console.print(
            f"  {slo_class.name:14} first token within {slo.ttft_slowdown:g} x the prompt's time alone (at least "
            f"{slo.ttft_floor_ms:.0f} ms), then {slo.tpot_ms:.0f} ms a token",
            highlight=False,
        )
    console.print(
        f"Each side gets {len(plan.calm)} requests in {settings.calm_s:g} s ({settings.calm_load:.0%} of capacity, in "
        f"{settings.calm_parts} turns), then {len(plan.burst)} in {settings.burst_s:g} s ({settings.burst_load:.0%}).",
        highlight=False,
    )


def _setup_json(setup: EngineSetup, profile: Profile, plan: DemoPlan, wall_s: float) -> dict[str, Any]:
    return {
        "model": profile.model_name,
        "device": profile.device,
        "engine_version": profile.engine_version,
        "vllm_args": list(setup.vllm_args),
        "profile": str(setup.profile_path),
        "profile_created": profile.created,
        "batch_time": {name: getattr(profile.model, name) for name in profile.model.__slots__},
        "capacity_per_s": plan.capacity_per_s,
        "decode_step_ms": 1000.0 * plan.decode_step_s,
        "classes": {slo_class.name: asdict(slo_class.slo) for slo_class in plan.classes},
        "wall_s": wall_s,
        **asdict(plan.settings),
    }


def _write(
    result: dict[str, Any],
    sides: dict[str, SideRun],
    plan: DemoPlan,
    setup: EngineSetup,
    json_file: Path | None,
    png: Path | None,
) -> None:
    from slos_serve.bench.plots import plot_demo

    _write_json(result, json_file)
    if png is not None:
        plot_demo(result, sides, plan, setup.profile_model, png)


def _write_json(result: dict[str, Any], json_file: Path | None) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _record(
    folder: Path, sides: dict[str, SideRun], plan: DemoPlan, setup: EngineSetup, header: dict[str, Any]
) -> None:
    from slos_serve.bench.demo_report import record_side

    folder.mkdir(parents=True, exist_ok=True)
    for name, side in sides.items():
        record_side(folder / f"{name}.jsonl", side, plan, setup.profile_model, {"side": name, **header})
