"""The ``slos-serve`` command: one file a sub-command, wired here.

A sub-command's module is imported when it is asked for. That keeps the command quick, and it keeps the planner's and
the simulator's kernels (numba) out of processes that start an engine: vLLM's CPU build scans each loaded module in its
workers and fails on llvmlite's.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from slos_serve.version import VERSION

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
# Name (of module and function), and its context settings.
COMMANDS: dict[str, dict[str, Any]] = {
    "serve": PASS_THROUGH,
    "profile": PASS_THROUGH,
    "bench": {},
    "compare": {},
    "classes": {},
    "doctor": {},
    "top": {},
    "explain": {},
    "demo": {},
    "simulate": {},
    "capacity": {},
    "size": {},
    "report": {},
    "replay": {},
}


# Module that is missing -> extra that brings it.
EXTRAS = {
    "aiohttp": "bench",
    "matplotlib": "bench",
    "plotly": "report",
    "prometheus_client": "vllm",
    "ray": "ray",
    "vllm": "vllm",
    "zmq": "vllm",
}


class LazyCommands(TyperGroup):
    """Sub-commands that are imported on first use."""

    def invoke(self, ctx: Any) -> Any:
        """Run the sub-command; one that needs an extra which is not installed says which."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in EXTRAS:
                raise
            typer.echo(f"slos-serve: {missing} is not installed: pip install 'slos-serve[{EXTRAS[missing]}]'", err=True)
            raise typer.Exit(2) from error

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of :data:`COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a sub-command; ``None`` for an unknown name, which click reports with the known ones."""
        if cmd_name not in COMMANDS:
            return None
        found = getattr(import_module(f"slos_serve.cli.{cmd_name}"), cmd_name)
        if isinstance(found, typer.Typer):  # with sub-commands of its own
            found.info.name = cmd_name
            return get_command(found)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name=cmd_name, context_settings=COMMANDS[cmd_name])(found)
        return get_command(single)


app = typer.Typer(
    name="slos-serve",
    cls=LazyCommands,
    help="Serve LLM requests so that each keeps its own latency promises.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"slos-serve {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Serve LLM requests so that each keeps its own latency promises."""
