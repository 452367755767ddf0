"""What the benchmark scripts of the simulator share: their options, and how they call the command line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SIX = ("summarization", "coding", "chat", "tool", "reasoning", "mixed")
RESULTS = Path(__file__).resolve().parent / "results"


def options(
    description: str | None,
    replicas: int,
    rate: float = 0.0,
    requests: int = 0,
    seeds: int = 0,
    scenarios: Sequence[str] = SIX,
    counts: Sequence[int] = (),
) -> argparse.Namespace:
    """``--output`` (made), ``--replicas``, ``--requests`` and ``--seeds`` (0: as the command has it),
    ``--rate``, ``--scenario``.

    With ``counts``, ``--count``, which may be repeated, takes the place of ``--replicas``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    if counts:
        parser.add_argument("--count", type=int, action="append", help=f"replicas; default: {list(counts)}")
    else:
        parser.add_argument("--replicas", type=int, default=replicas)
    parser.add_argument("--requests", type=int, default=requests)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--scenario", action="append", help=f"may be repeated; default: {', '.join(scenarios)}")
    given = parser.parse_args()
    if counts:
        given.count = given.count or list(counts)
    given.scenario = given.scenario or list(scenarios)
    given.output.mkdir(parents=True, exist_ok=True)
    return given


def sizes(given: argparse.Namespace) -> list[str]:
    """``--requests`` and ``--seeds``, where they were asked for."""
    asked = {"--requests": given.requests, "--seeds": given.seeds}
    return [word for name, value in asked.items() if value for word in (name, str(value))]


def run_command(*arguments: str) -> None:
    """Run ``slos-serve`` with these arguments; stops the script when it fails."""
    program = "from slos_serve.cli.main import app; app()"
    print("slos-serve", *arguments, flush=True)
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
