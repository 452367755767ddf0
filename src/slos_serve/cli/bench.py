"""``slos-serve bench``: load on any OpenAI-compatible server, scored per class."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slos_serve.cli import bench_options as given
from slos_serve.cli.printed import failure, interrupted, output_file, progress_bar, say, stdout_console, warn
from slos_serve.core.errors import SlosServeError

if TYPE_CHECKING:
    from slos_serve.bench.client import ClientSettings
    from slos_serve.bench.requests import Response
    from slos_serve.bench.run import BenchRun


def bench(
    base_url: Annotated[str, typer.Option("--base-url", help="Address of the server, with or without /v1.")],
    classes_file: given.ClassesFile,
    workload: given.Workload = None,
    trace: given.Trace = None,
    dataset: given.Dataset = None,
    rate: given.Rate = None,
    duration: given.Duration = None,
    seed: given.Seed = 0,
    model: given.ModelName = None,
    profile: given.ProfileFile = None,
    api: given.ApiOption = "chat",
    send_slo: Annotated[bool, typer.Option("--send-slo/--no-send-slo", help="Tell the server, or only score.")] = True,
    slo_in: Annotated[given.SloIn, typer.Option(help="Where the SLO goes; body is vllm_xargs.")] = "headers",
    arrival_cv: given.ArrivalCv = 1.0,
    length_scale: given.LengthScale = 1.0,
    ignore_eos: given.IgnoreEos = False,
    timeout: given.Timeout = 600.0,
    wait: given.Wait = given.DEFAULT_WAIT_S,
    json_file: given.JsonFile = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write the table here, a line a class.", callback=output_file)
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the table here, as a page.", callback=output_file)
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record",
            "--save-requests",
            help="Write every request with its token times (JSON lines).",
            callback=output_file,
        ),
    ] = None,
) -> None:
    """Send requests when they are due and count how many kept their SLO, per class.

    The API key, if the server wants one, is read from OPENAI_API_KEY. `slos-serve compare` sends the same requests to
    two servers.
    """
    from slos_serve.bench.run import BenchSettings

    settings = BenchSettings(
        workload, trace, rate, duration, seed, arrival_cv, length_scale, ignore_eos, dataset=dataset
    )
    try:
        sent = given.sent_of(settings, classes_file, profile)
        client = given.client_of(base_url, model, api, slo_in if send_slo else None, sent, timeout, wait)
        run = sent_to(client, sent)
    except SlosServeError as error:
        raise failure(error) from None
    except KeyboardInterrupt:
        raise interrupted() from None
    _print(run, base_url)
    if json_file:
        json_file.write_text(json.dumps(run.as_json(), indent=2) + "\n", encoding="utf-8")
    _write_tables(run, csv_file, html_file)
    if record:
        run.write_record(record)


def sent_to(client: ClientSettings, sent: given.Sent, label: str = "requests") -> BenchRun:
    """Send everything to one server, with a progress line."""
    from slos_serve.bench.run import run_bench

    with progress_bar() as progress:
        task = progress.add_task(f"{label}: waiting for {client.base_url}", total=None)

        def started(count: int) -> None:
            progress.update(task, description=label, total=count)

        def ended(_response: Response) -> None:
            progress.advance(task)

        return asyncio.run(run_bench(sent.settings, client, sent.classes, sent.model, started, ended))


def _print(run: BenchRun, base_url: str) -> None:
    from slos_serve.bench.report import class_table

    stdout_console().print(class_table(run.summary, f"{run.server.model} at {base_url}"))
    for name, tasks in run.tasks.items():
        say(f"{name}: {tasks['attained']} of {tasks['tasks']} tasks in time")
    for warning in run.warnings:
        warn(warning)
    for message, count in list(run.as_json()["errors"].items())[:5]:
        say(f"{count} x {message}")


def _write_tables(run: BenchRun, csv_file: Path | None, html_file: Path | None) -> None:
    from slos_serve.bench.exports import class_csv, class_html

    if csv_file:
        csv_file.write_text(class_csv(run.summary), encoding="utf-8")
    if html_file:
        title = f"{run.server.model} at {run.header()['base_url']}"
        html_file.write_text(class_html(run.summary, title, run.header(), run.warnings), encoding="utf-8")
