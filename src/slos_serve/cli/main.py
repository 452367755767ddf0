"""The ``slos-serve`` command: one file a sub-command, wired here.

A sub-command's module is imported when it is asked for. That keeps the command quick, and it keeps the planner's and
the simulator's kernels (numba) out of processes that start an engine: vLLM's CPU build scans each loaded module in its
workers and fails on llvmlite's.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
# Name (of module and function), and its context settings.
COMMANDS: dict[str, dict[str, Any]] = {
    "serve": PASS_THROUGH,
    "profile": PASS_THROUGH,
    "bench": {},
    "demo": {},
    "simulate": {},
    "capacity": {},
    "size": {},
    "report": {},
    "replay": {},
}


class LazyCommands(TyperGroup):
    """Sub-commands that are imported on first use."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of :data:`COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a sub-command; ``None`` for an unknown name, which click reports with the known ones."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"slos_serve.cli.{cmd_name}")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name=cmd_name, context_settings=COMMANDS[cmd_name])(getattr(module, cmd_name))
        return get_command(single)


app = typer.Typer(
    name="slos-serve",
    cls=LazyCommands,
    help="Serve LLM requests so that each keeps its own latency promises.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def main() -> None:
    """Serve LLM requests so that each keeps its own latency promises."""
