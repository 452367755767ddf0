"""``slos-serve bench``: load on any OpenAI-compatible server, scored per class."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from slos_serve.cli.printed import stdout_console
from slos_serve.core.errors import SlosServeError


def bench(
    base_url: Annotated[str, typer.Option("--base-url", help="Address of the server, with or without /v1.")],
    classes_file: Annotated[Path, typer.Option("--classes", help="Class file (YAML) that requests are held to.")],
    workload: Annotated[
        str | None, typer.Option(help="Named workload: chat, coding, summarization, editing, mixed.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Trace file instead: Azure or BurstGPT CSV, Mooncake JSONL.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Mean arrivals a second; a trace is sped up or slowed to it.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds during which requests arrive.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of arrivals, lengths and texts.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model name; default: the first that the server lists.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Batch-time profile of the server's engine, for TTFT given as a slowdown.")
    ] = None,
    api: Annotated[str, typer.Option(help="'chat' or 'completions'.")] = "chat",
    send_slo: Annotated[bool, typer.Option("--send-slo/--no-send-slo", help="Tell the server, or only score.")] = True,
    slo_in: Annotated[str, typer.Option(help="Where the SLO goes: 'headers' or 'body' (vllm_xargs).")] = "headers",
    arrival_cv: Annotated[
        float, typer.Option(help="Variation of arrival gaps: 1 Poisson, above bursty, 0 even.")
    ] = 1.0,
    length_scale: Annotated[float, typer.Option(help="Factor on the lengths of a named workload.")] = 1.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of exactly max_tokens (vLLM, SGLang).")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request counts as failed.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", "--save-requests", help="Write every request with its token times (JSON lines)."),
    ] = None,
) -> None:
    """Send requests when they are due and count how many kept their SLO, per class.

    The API key, if the server wants one, is read from OPENAI_API_KEY.
    """
    from slos_serve.bench.client import ClientSettings
    from slos_serve.bench.report import class_table
    from slos_serve.bench.requests import Response
    from slos_serve.bench.run import BenchSettings, run_bench, token_ids_wanted
    from slos_serve.files.class_file import load_classes
    from slos_serve.files.profile_file import load_profile

    errors = Console(stderr=True)
    if api not in ("chat", "completions"):
        raise typer.BadParameter("must be 'chat' or 'completions'", param_hint="--api")
    if (workload is None) == (trace is None):
        raise typer.BadParameter("give --workload NAME or --trace FILE, one of them", param_hint="--workload")
    try:
        classes = load_classes(classes_file)
        model_of_time = load_profile(profile).model if profile else None
        settings = BenchSettings(workload, trace, rate, duration, seed, arrival_cv, length_scale, ignore_eos)
        client_settings = ClientSettings(
            base_url=base_url,
            model=model,
            chat=api == "chat",
            slo_in=slo_in if send_slo else "none",
            timeout_s=timeout,
            api_key=os.environ.get("OPENAI_API_KEY"),
            want_token_ids=token_ids_wanted(classes),
        )
        with _progress(errors) as progress:
            task = progress.add_task("requests", total=None)

            def on_end(_response: Response) -> None:
                progress.advance(task)

            run = asyncio.run(
                run_bench(
                    settings,
                    client_settings,
                    classes,
                    model_of_time,
                    lambda count: progress.update(task, total=count),
                    on_end,
                )
            )
    except SlosServeError as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("stopped; nothing was written")
        raise typer.Exit(130) from None
    stdout_console().print(class_table(run.summary, f"{run.server.model} at {base_url}"))
    for warning in run.warnings:
        errors.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    for message, count in list(run.as_json()["errors"].items())[:5]:
        errors.print(f"{count} x {message}", highlight=False, markup=False)
    if json_file:
        json_file.write_text(json.dumps(run.as_json(), indent=2) + "\n", encoding="utf-8")
    if record:
        run.write_record(record)


def _progress(console: Console) -> Progress:
    # Few redraws: the client may share its processor with the server it measures.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=2,
        transient=True,
    )
