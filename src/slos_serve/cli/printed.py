"""What every command prints alike: tables, progress, errors; and the exit statuses.

Exit status 0: done. 1: it ran and failed, or found something wrong. 2: the command line, a file or a variable cannot be
used; nothing was run. 130: interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from slos_serve.core.errors import InvalidFieldError, ProfileMismatchError, SlosServeError

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130
# Columns of a table that does not go to a terminal.
FILE_WIDTH = 130
# Few redraws: a command may share its processor with what it measures.
REDRAWS_PER_S = 2.0


def output_file(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of an option that names a file to write: refuses it before anything runs, and makes its folder.

    Raises:
        typer.BadParameter: it cannot be written.
    """
    if path is None or str(path) == "-" or context.resilient_parsing:  # the shell completes a line that is not run
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise typer.BadParameter(f"{path} cannot be written: {fault.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written")
    return path


def stdout_console() -> Console:
    """A console on standard output."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def say(text: str, style: str = "", label: str = "") -> None:
    """One line on standard error, as it is; ``label`` stands before it in ``style``."""
    console = Console(stderr=True)
    line = Text.assemble((label, style), " ", text) if label else Text(text, style=style)
    console.print(line, soft_wrap=True)


def warn(text: str) -> None:
    """A warning."""
    say(text, "yellow", "warning:")


def failure(error: SlosServeError, shown: Callable[[str], str] = str) -> typer.Exit:
    """Print what is wrong; the exit to raise.

    Args:
        error: what was raised.
        shown: takes secrets out of the message.
    """
    say(shown(str(error)), "bold red", "error:")
    unusable = isinstance(error, InvalidFieldError | ProfileMismatchError)
    return typer.Exit(USAGE_ERROR if unusable else FAILED)


def interrupted() -> typer.Exit:
    """Say that nothing was written; the exit to raise."""
    say("stopped; nothing was written")
    return typer.Exit(INTERRUPTED)


def progress_bar(counted: bool = True) -> Progress:
    """A progress line on standard error that goes when it is done; ``counted`` shows how many of how many."""
    columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), BarColumn())
    columns = (*columns, *((MofNCompleteColumn(),) if counted else ()), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=REDRAWS_PER_S)
