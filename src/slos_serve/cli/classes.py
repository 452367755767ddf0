"""``slos-serve classes``: check a class file, print its JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from slos_serve.cli.printed import USAGE_ERROR, failure, say, stdout_console
from slos_serve.cli.promises import shown_first_token, shown_per_token, shown_whole
from slos_serve.core.errors import SlosServeError
from slos_serve.core.slo import SLOClass
from slos_serve.files.class_file import ClassFile, load_class_file
from slos_serve.files.profile_file import load_profile, profile_path
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel

# Prompt lengths that a slowdown promise is shown for.
SHOWN_PROMPTS = (100, 1000, 8000)

classes = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Check a class file, or print its JSON Schema.",
)


@classes.command()
def check(
    file: Annotated[Path, typer.Argument(help="The class file.")],
    profile: Annotated[
        str | None,
        typer.Option(help="Batch-time profile, a file or a shipped one: also check what this engine can do at best."),
    ] = None,
) -> None:
    """Read FILE as the server does; print what it promises, or its first fault with file and line.

    Exit status 0: the file can be used. 2: it cannot, or a promise is impossible on the profile's engine.
    """
    console = stdout_console()
    try:
        found = load_class_file(file)
        model = None if profile is None else load_profile(profile_path(profile)).model
    except SlosServeError as error:
        raise failure(error) from None
    console.print(_table(found, model))
    if found.classes.default is None:
        console.print("Requests that name no class get no promise: there is no default_class.")
    impossible = [] if model is None else [said for one in found.classes for said in impossible_promises(one, model)]
    for said in impossible:
        say(f"{file}: {said}", "bold red", "error:")
    raise typer.Exit(USAGE_ERROR if impossible else 0)


@classes.command()
def schema() -> None:
    """Print the JSON Schema of class files, for editors that check YAML as it is written."""
    from slos_serve.files.class_schema import class_file_schema

    typer.echo(json.dumps(class_file_schema(), indent=2))


def impossible_promises(slo_class: SLOClass, model: BatchTimeModel) -> list[str]:
    """Promises that not even an idle engine keeps, as sentences."""
    found = []
    step_ms = 1e3 * model.step_s(BatchShape(new_tokens=1, num_seqs=1))
    for index, stage in enumerate(slo_class.stages):
        tpot_ms = stage.slo.tpot_ms
        if tpot_ms is not None and tpot_ms < step_ms:
            where = f"classes.{slo_class.name}" + (f".stages[{index}]" if len(slo_class.stages) > 1 else "")
            found.append(f"{where}.tpot_ms: {tpot_ms:g}; this engine's fastest step takes {step_ms:.1f} ms")
    ttft_ms = slo_class.slo.ttft_ms
    alone_ms = 1e3 * model.zero_load_s(1)
    if ttft_ms is not None and ttft_ms < alone_ms:
        found.append(
            f"classes.{slo_class.name}.ttft_ms: {ttft_ms:g}; a prompt of one token takes {alone_ms:.1f} ms alone"
        )
    return found


def _table(found: ClassFile, model: BatchTimeModel | None) -> Table:
    table = Table(title="promises", title_justify="left")
    for column in ("class", "first token", "per output token", "as a whole", "weight", "when full"):
        table.add_column(column)
    for slo_class in found.classes:
        name = f"{slo_class.name} (default)" if slo_class.name == found.classes.default else slo_class.name
        full = "-" if slo_class.best_effort else slo_class.when_full.value
        promised = _first_token(slo_class, model), shown_per_token(slo_class), shown_whole(slo_class)
        table.add_row(name, *promised, f"{slo_class.weight:g}", full)
    return table


def _first_token(slo_class: SLOClass, model: BatchTimeModel | None) -> str:
    slo, said = slo_class.slo, shown_first_token(slo_class.slo)
    if slo.ttft_slowdown is None or model is None:
        return said
    shown = ", ".join(f"{tokens}: {1e3 * slo.ttft_s(model.zero_load_s(tokens)):.0f} ms" for tokens in SHOWN_PROMPTS)
    return f"{said} (prompt of {shown})"
