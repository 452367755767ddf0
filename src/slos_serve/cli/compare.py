"""``slos-serve compare``: the same requests to two servers in turns, and the ratio with its interval."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from slos_serve.cli import bench_options as given
from slos_serve.cli.printed import failure, interrupted, progress_bar, stdout_console
from slos_serve.core.errors import SlosServeError

if TYPE_CHECKING:
    from rich.progress import Progress

    from slos_serve.bench.client import ClientSettings
    from slos_serve.bench.comparison import Comparison
    from slos_serve.bench.run import BenchRun, BenchSettings


def compare(
    url_a: Annotated[str, typer.Argument(metavar="URL_A", help="Server A, such as stock vLLM.")],
    url_b: Annotated[str, typer.Argument(metavar="URL_B", help="Server B.")],
    classes_file: given.ClassesFile,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Seeds; an interval takes six.")] = 6,
    workload: given.Workload = None,
    trace: given.Trace = None,
    dataset: given.Dataset = None,
    rate: given.Rate = None,
    duration: given.Duration = None,
    seed: given.Seed = 0,
    model: given.ModelName = None,
    profile: given.ProfileFile = None,
    api: given.ApiOption = "chat",
    arrival_cv: given.ArrivalCv = 1.0,
    length_scale: given.LengthScale = 1.0,
    ignore_eos: given.IgnoreEos = False,
    timeout: given.Timeout = 600.0,
    wait: given.Wait = given.DEFAULT_WAIT_S,
    json_file: given.JsonFile = None,
) -> None:
    """Send the same requests to two servers, one server at a time, in turns.

    Each round sends one seed's requests to both; the server that is first changes from round to round. Printed are
    promises kept, output tokens/s, TTFT and TPOT of both, and B against A: the median over rounds, with 95 % interval.
    """
    from slos_serve.bench.run import BenchSettings

    settings = BenchSettings(
        workload, trace, rate, duration, seed, arrival_cv, length_scale, ignore_eos, dataset=dataset
    )
    try:
        sent = given.sent_of(settings, classes_file, profile)
        clients = [given.client_of(url, model, api, "headers", sent, timeout, wait) for url in (url_a, url_b)]
        found = _compared(sent, clients[0], clients[1], rounds)
    except SlosServeError as error:
        raise failure(error) from None
    except KeyboardInterrupt:
        raise interrupted() from None
    stdout_console().print(found.table((url_a, url_b)))
    if json_file:
        json_file.write_text(json.dumps(found.as_json((url_a, url_b)), indent=2) + "\n", encoding="utf-8")


def _compared(sent: given.Sent, a: ClientSettings, b: ClientSettings, rounds: int) -> Comparison:
    from slos_serve.bench.comparison import compared

    with progress_bar() as progress:
        runs = [_side(progress, label, client, sent) for label, client in (("A", a), ("B", b))]
        return asyncio.run(compared(sent.settings, runs[0], runs[1], rounds))


def _side(
    progress: Progress, label: str, client: ClientSettings, sent: given.Sent
) -> Callable[[BenchSettings], Awaitable[BenchRun]]:
    """One server's runs, each counted on a line of its own."""
    from slos_serve.bench.run import run_bench

    task = progress.add_task(f"{label} waits", total=None)

    async def run(settings: BenchSettings) -> BenchRun:
        def started(count: int) -> None:
            progress.reset(task, description=f"{label}, seed {settings.seed}", total=count)

        return await run_bench(settings, client, sent.classes, sent.model, started, lambda _: progress.advance(task))

    return run
