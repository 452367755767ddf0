"""What the benchmark scripts of the simulator share: their options, and how they call the command line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def options(description: str | None, replicas: int, rate: float = 0.0, requests: int = 1500) -> argparse.Namespace:
    """``--output``, ``--replicas``, ``--requests`` and ``--rate``; the output folder is made."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--replicas", type=int, default=replicas)
    parser.add_argument("--requests", type=int, default=requests)
    parser.add_argument("--rate", type=float, default=rate)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    return given


def run_command(*arguments: str) -> None:
    """Run ``slos-serve`` with these arguments; stops the script when it fails."""
    program = "from slos_serve.cli.main import app; app()"
    print("slos-serve", *arguments, flush=True)
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
