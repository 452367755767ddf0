"""The ``slos-serve`` command: one file a sub-command, wired here."""

from __future__ import annotations

import typer

from slos_serve.cli.bench import bench
from slos_serve.cli.capacity import capacity
from slos_serve.cli.demo import demo
from slos_serve.cli.profile import profile
from slos_serve.cli.serve import PASS_THROUGH, serve
from slos_serve.cli.simulate import simulate
from slos_serve.cli.size import size

app = typer.Typer(
    name="slos-serve",
    help="Serve LLM requests so that each keeps its own latency promises.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def main() -> None:
    """Serve LLM requests so that each keeps its own latency promises."""


app.command(context_settings=PASS_THROUGH)(serve)
app.command(context_settings=PASS_THROUGH)(profile)
app.command()(bench)
app.command()(demo)
app.command()(simulate)
app.command()(capacity)
app.command()(size)
