"""What the benchmark scripts of the simulator share: their options, and how they call the command line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def options(
    description: str | None, replicas: int, rate: float = 0.0, requests: int = 1500, drafters: bool = False
) -> argparse.Namespace:
    """``--output``, ``--replicas``, ``--requests`` and ``--rate``; the output folder is made.

    With ``drafters`` also ``--drafter`` and ``--acceptance``, see :func:`speculation`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--replicas", type=int, default=replicas)
    parser.add_argument("--requests", type=int, default=requests)
    parser.add_argument("--rate", type=float, default=rate)
    if drafters:
        parser.add_argument("--drafter", default="none")
        parser.add_argument("--acceptance", type=float, default=0.7)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    return given


def speculation(given: argparse.Namespace) -> list[str]:
    """Arguments that put a drafter into the simulated engine."""
    return ["--drafter", given.drafter, "--acceptance", str(given.acceptance)]


def run_command(*arguments: str) -> None:
    """Run ``slos-serve`` with these arguments; stops the script when it fails."""
    program = "from slos_serve.cli.main import app; app()"
    print("slos-serve", *arguments, flush=True)
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
