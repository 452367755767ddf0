"""Where tables go: as wide as the terminal, or wide enough for any of them where there is none."""

from __future__ import annotations

import sys

from rich.console import Console

# Columns of a table that does not go to a terminal.
FILE_WIDTH = 130


def stdout_console() -> Console:
    """A console on standard output."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
