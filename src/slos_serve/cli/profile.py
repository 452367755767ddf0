"""``slos-serve profile``: measure batch times on the real engine, fit them, say how well."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from slos_serve.cli.printed import failure, interrupted, output_file, progress_bar, stdout_console
from slos_serve.core.errors import SlosServeError
from slos_serve.files.profile_file import Profile, default_profile_path, samples_path, save_profile
from slos_serve.launch.folders import prepare_folders
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.residuals import FOLLOWED

if TYPE_CHECKING:
    from slos_serve.profiling.run import ProfileRun

# The planner keeps margins for errors of about this size; beyond it promises are made that cannot be kept.
GOAL_MEDIAN, GOAL_P90, GOAL_R2 = 0.05, 0.15, 0.95
_PHASES = {"start": "starting the engine", "measure": "measuring batches", "fit": "fitting"}
_MEANINGS = {
    "k_c_s": "per new token, compute-bound",
    "b_c_s": "constant, compute-bound",
    "k_m_s": "per new token, memory-bound",
    "b_m_s": "constant, memory-bound",
    "k_ctx_s": "per cached token read",
    "k_q_s": "per chunk * (chunk + 2 * done)",
    "k_seq_s": "per request in the batch and draft to verify",
    "k_s_s": "per sequential draft step",
}


def profile(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What vLLM loads: a hub name or a folder; 'smollm2' needs no download.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Profile to write; default: where 'serve' and 'demo' look for it.", callback=output_file),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds of measuring, after the engine has started.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the batches and prompts.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here too.", callback=output_file)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Chart of predicted against measured; default: beside the profile.", callback=output_file),
    ] = None,
) -> None:
    """Measure how long batches of MODEL take on this machine and fit the batch-time model.

    Nothing else should run on the machine meanwhile. Options that are not listed here go to vLLM as they are.
    """
    errors = Console(stderr=True)
    try:
        prepare_folders(os.environ, lambda said: errors.print(said, markup=False, soft_wrap=True))
        run = _measure(model, tuple(context.args), duration, seed)
        path = output or _default_path(run.profile)
        save_profile(run.profile, path, run.samples)
        chart = plot or path.with_suffix(".png")
        _draw(run, chart)
        if json_file:
            _write_json(run, path, json_file)
    except SlosServeError as error:
        raise failure(error) from None
    except KeyboardInterrupt:
        raise interrupted() from None
    _report(stdout_console(), run, path, chart)


def _measure(model: str, vllm_args: tuple[str, ...], duration_s: float, seed: int) -> ProfileRun:
    from slos_serve.launch.cpu_engine import cpu_model_args, set_cpu_environment
    from slos_serve.launch.cpu_model import resolve_model
    from slos_serve.launch.server import LOGGING_ENV

    os.environ.setdefault(LOGGING_ENV, "ERROR")  # the engine writes where the progress bar is
    path = str(resolve_model(model))
    if path != model:
        vllm_args = cpu_model_args(vllm_args)
        set_cpu_environment()
    # Importing the engine takes seconds, which `--help` should not pay.
    from slos_serve.profiling.run import profile_engine

    with progress_bar(counted=False) as progress:
        task = progress.add_task(_PHASES["start"], total=None)

        def told(phase: str, part: float) -> None:
            progress.update(task, description=_PHASES[phase], total=None if phase == "start" else 1.0, completed=part)

        return profile_engine(path, vllm_args, duration_s=duration_s, seed=seed, progress=told)


def _default_path(found: Profile) -> Path:
    return default_profile_path(found.identity)


def _draw(run: ProfileRun, chart: Path) -> None:
    from slos_serve.bench.profile_plot import plot_profile

    found = run.profile
    plot_profile(found.model, run.samples, f"{found.model_name} on {found.device}, vLLM {found.engine_version}", chart)


def _write_json(run: ProfileRun, path: Path, json_file: Path) -> None:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    record |= {
        "profile_file": str(path),
        "num_samples": len(run.samples),
        "num_disturbed": run.num_disturbed,
        "async_scheduling": run.async_scheduling,
        "max_num_seqs": run.max_num_seqs,
        "goal_met": meets_goal(run.profile),
    }
    json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def meets_goal(found: Profile) -> bool:
    """Whether what the planner plans with is near enough on held-out batches for its margins."""
    error = found.fit.get(FOLLOWED) or found.fit["all"]
    return error.median < GOAL_MEDIAN and error.p90 < GOAL_P90 and error.r2 is not None and error.r2 > GOAL_R2


def _report(console: Console, run: ProfileRun, path: Path, chart: Path) -> None:
    found = run.profile
    scheduling = "on" if run.async_scheduling else "off"
    console.print(
        f"{found.model_name} on {found.device}, vLLM {found.engine_version}, {found.dtype}, "
        f"TP {found.tensor_parallel}, async scheduling {scheduling}; {len(run.samples)} batches "
        f"({run.num_disturbed} more discarded: hypervisor steal)",
        highlight=False,
        markup=False,
    )
    console.print(
        f"KV cache {found.kv_capacity_tokens} tokens in blocks of {found.block_size}; "
        f"at most {found.max_num_batched_tokens} tokens and {run.max_num_seqs} requests a batch",
        highlight=False,
    )
    console.print(_coefficient_table(found.model))
    console.print(_error_table(found))
    ratios = ", ".join(f"p{100 * q:g} {ratio:.3f}" for q, ratio in sorted(found.residual_quantiles.items()))
    console.print(f"measured / predicted: {ratios}", highlight=False)
    console.print(f"'{FOLLOWED}': corrected online by the steps before it, as in service", highlight=False)
    if not meets_goal(found):
        console.print(
            f"[yellow]warning:[/yellow] the goal is median under {GOAL_MEDIAN:.0%}, p90 under {GOAL_P90:.0%} and R² "
            f"above {GOAL_R2}: was the machine busy? Measure again with nothing else running.",
            highlight=False,
        )
    for file in (path, samples_path(path), chart):
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)


def _coefficient_table(model: BatchTimeModel) -> Table:
    table = Table(title="Batch-time model", title_justify="left")
    table.add_column("coefficient")
    table.add_column("seconds", justify="right")
    table.add_column("is")
    for field in fields(model):
        table.add_row(field.name, f"{getattr(model, field.name):.4g}", _MEANINGS[field.name])
    return table


def _error_table(found: Profile) -> Table:
    table = Table(title="Relative error on held-out batches", title_justify="left")
    for name in ("region", "batches", "median", "p90", "bias", "R²"):
        table.add_column(name, justify="left" if name == "region" else "right")
    ordered = sorted(found.fit.items(), key=lambda pair: pair[0] not in ("all", FOLLOWED))
    for region, error in ordered:
        values = asdict(error)
        shown = [f"{values[name]:.1%}" for name in ("median", "p90")] + [f"{error.bias:+.1%}"]
        table.add_row(region, str(error.samples), *shown, "-" if error.r2 is None else f"{error.r2:.3f}")
    return table
