"""Options that `bench` and `compare` share: what is sent, and how it is scored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from slos_serve.cli.printed import output_file
from slos_serve.core.errors import InvalidFieldError

if TYPE_CHECKING:
    from slos_serve.bench.client import ClientSettings
    from slos_serve.bench.run import BenchSettings
    from slos_serve.core.slo import ClassSet
    from slos_serve.perf.batch_time import BatchTimeModel

Api = Literal["chat", "completions"]
SloIn = Literal["headers", "body"]
ClassesFile = Annotated[Path, typer.Option("--classes", help="Class file (YAML) that requests are held to.")]
Workload = Annotated[str | None, typer.Option(help="Named workload: chat, coding, summarization, editing, mixed.")]
Trace = Annotated[Path | None, typer.Option(help="Trace file instead: Azure or BurstGPT CSV, Mooncake JSONL.")]
Dataset = Annotated[
    Path | None, typer.Option(help="Prompts instead: ShareGPT JSON; JSON lines or CSV with prompt and output_tokens.")
]
Rate = Annotated[float | None, typer.Option(help="Mean arrivals a second; a trace is sped up or slowed to it.")]
Duration = Annotated[float | None, typer.Option(help="Seconds during which requests arrive.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of arrivals, lengths and texts.")]
ModelName = Annotated[str | None, typer.Option(help="Model name; default: the first that the server lists.")]
ProfileFile = Annotated[
    Path | None, typer.Option(help="Batch-time profile of the server's engine, for TTFT given as a slowdown.")
]
ApiOption = Annotated[Api, typer.Option(help="Endpoint that requests go to.")]
ArrivalCv = Annotated[float, typer.Option(help="Variation of arrival gaps: 1 Poisson, above bursty, 0 even.")]
LengthScale = Annotated[float, typer.Option(help="Factor on the lengths of a named workload.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Answers of exactly max_tokens (vLLM, SGLang).")]
Timeout = Annotated[float, typer.Option(help="Seconds after which a request counts as failed.")]
Wait = Annotated[float, typer.Option(min=0.0, help="Seconds to wait for a server that does not answer yet.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result here.", callback=output_file)]
DEFAULT_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Sent:
    """What is sent, checked as far as the command line goes."""

    settings: BenchSettings
    classes: ClassSet
    model: BatchTimeModel | None


def sent_of(settings: BenchSettings, classes_file: Path, profile: Path | None) -> Sent:
    """Open the files.

    Raises:
        InvalidFieldError: a file cannot be used, or not exactly one source of requests is given.
    """
    from slos_serve.files.class_file import load_classes
    from slos_serve.files.profile_file import load_profile

    sources = [settings.workload, settings.trace, settings.dataset]
    if sum(source is not None for source in sources) != 1:
        given = [str(source) for source in sources if source is not None]
        raise InvalidFieldError("--workload", given, "--workload NAME, --trace FILE or --dataset FILE, one of them")
    return Sent(settings, load_classes(classes_file), load_profile(profile).model if profile else None)


def client_of(
    base_url: str, model: str | None, api: Api, slo_in: SloIn | None, sent: Sent, timeout_s: float, wait_s: float
) -> ClientSettings:
    """Where requests go and how; ``slo_in`` is ``None`` for SLOs that are only scored."""
    from slos_serve.bench.client import ClientSettings
    from slos_serve.bench.run import token_ids_wanted

    return ClientSettings(
        base_url=base_url,
        model=model,
        chat=api == "chat",
        slo_in=slo_in or "none",
        timeout_s=timeout_s,
        wait_s=wait_s,
        api_key=os.environ.get("OPENAI_API_KEY"),
        want_token_ids=token_ids_wanted(sent.classes),
    )
