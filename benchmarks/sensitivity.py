"""What half and twice of each constant of the planner do on two engines that no constant was chosen on.

    python -m benchmarks.sensitivity [--constants WAIT_SHARE TO_COME] [--requests 300] [--seeds 24 25] [--jobs 2]

Loads of ``benchmarks.heldout``, three scenarios. Each variant is a patch, run in a process of its own in which kernels
are compiled anew (a minute and a half each). Prints points of attained requests against today's value.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from benchmarks.heldout import measure
from slos_serve.sim.conditions import AS_SERVED
from slos_serve.sim.seeds import check_test

ENGINES = ("llama-2-7b-h100", "opt-66b-a100-tp4")
SCENARIOS = ("chat", "mixed", "summarization")


class Constant(NamedTuple):
    """One constant: its name, the modules of ``slos_serve.planning`` that read it, and the values tried beside it."""

    name: str
    modules: tuple[str, ...]
    values: tuple[float, float] | None = None

    def today(self) -> float:
        """Its value."""
        module = importlib.import_module(f"slos_serve.planning.{self.modules[0]}")
        return float(getattr(module, self.name))

    def tried(self) -> tuple[float, float]:
        """Half and twice of it, unless these mean nothing."""
        return self.values or (0.5 * self.today(), 2.0 * self.today())


CONSTANTS = (
    Constant("STEP_SHARE_OF_TTFT", ("arrivals",)),
    Constant("LEAST_STEP_FIXED", ("arrivals",)),
    Constant("DOUBLES_S", ("arrivals",)),
    Constant("LOAD_OVER_S", ("arrivals",)),
    Constant("KV_SHORT_FROM", ("supply",), (0.35, 0.89)),
    Constant("AHEAD_TOKENS", ("state", "tiers")),
    Constant("FIRST_LEAD", ("state",)),
    Constant("ROOM_FOR", ("form",)),
    Constant("CUT_SHORT", ("admission",)),
    Constant("TO_COME", ("admission",)),
    Constant("MOST_WORK", ("admission",)),
    Constant("SPREAD", ("memory",)),
    Constant("WAIT_SHARE", ("work", "form")),
    Constant("OTHERS_SHARE", ("work",), (0.25, 1.0)),
    Constant("CROWDED_SHARE", ("form",)),
    Constant("LEAD_OF_PACE", ("best_effort",)),
    Constant("LEAD_OF_STALL", ("best_effort",)),
    Constant("TURN_TOKENS", ("form",)),
    Constant("DECODE_TURNS", ("best_effort",)),
    Constant("LEAST_SURE", ("planner",), (0.25, 0.75)),
)


def patch(constant: Constant, value: float) -> None:
    """Set a constant before kernels are compiled."""
    for name in constant.modules:
        module = importlib.import_module(f"slos_serve.planning.{name}")
        setattr(module, constant.name, type(getattr(module, constant.name))(value))


def attained(requests: int, seeds: Sequence[int]) -> list[float]:
    """Attained on each engine, mean over the scenarios, as shares."""
    return [
        float(np.mean([measure(scenario, seeds, requests, engine, AS_SERVED).attained for scenario in SCENARIOS]))
        for engine in ENGINES
    ]


def variant(constant: str, value: float, requests: int, seeds: Sequence[int]) -> list[float]:
    """:func:`attained` with one constant changed (none for ``""``), in another process without a cache of kernels."""
    code = (
        "import json, sys\nfrom benchmarks import sensitivity as s\n"
        f"chosen = [one for one in s.CONSTANTS if one.name == {constant!r}]\n"
        f"[s.patch(one, {value!r}) for one in chosen]\n"
        f"print(json.dumps(s.attained({requests}, {list(seeds)})))"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [float(share) for share in json.loads(done.stdout.splitlines()[-1])]


def row(constant: Constant, today: Sequence[float], found: Sequence[Sequence[float]]) -> str:
    """A line of the table."""
    cells = [f"`{constant.name}`", f"{constant.today():g}"]
    for value, shares in zip(constant.tried(), found, strict=True):
        points = (f"{100.0 * (share - base):+.1f}" for share, base in zip(shares, today, strict=True))
        cells.append(f"{value:g}: {', '.join(points)}")
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.name for one in CONSTANTS]
    parser.add_argument("--constants", nargs="+", choices=names, default=names)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[24, 25])
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args(arguments)
    seeds = check_test(given.seeds)
    chosen = [one for one in CONSTANTS if one.name in given.constants]
    with ThreadPoolExecutor(given.jobs) as pool:
        base = pool.submit(variant, "", 0.0, given.requests, seeds)
        runs = [
            (one, [pool.submit(variant, one.name, value, given.requests, seeds) for value in one.tried()])
            for one in chosen
        ]
        today = base.result()
        shares = ", ".join(f"{100.0 * share:.1f} % ({name})" for name, share in zip(ENGINES, today, strict=True))
        print(f"Attained today: {shares}\n")
        print("| constant | today | half: points | twice: points |\n|---|---|---|---|")
        for one, futures in runs:
            print(row(one, today, [future.result() for future in futures]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
