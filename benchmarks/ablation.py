"""Attained with one idea of the planner off at a time: each variant is a patch of one function or constant.

    python -m benchmarks.ablation [--requests 400] [--seeds 22 23] [--profile llama-3.1-8b-h100]

At the rates of ``benchmarks.heldout``, as served; patches live here, the planner has no switches for them. Kernels are
compiled anew for each variant, in a process of its own and without a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks._sim_commands import RESULTS
from slos_serve.sim.seeds import FIRST_TEST_SEED, table_seeds

# Name -> statements that run before the planner's kernels are compiled.
VARIANTS = {
    "all ideas": "",
    "greedy set, no program": "import slos_serve.planning.admission as m; m.MOST_WORK = 0",
    "no lent time": "import numba, numpy as np, slos_serve.planning.admission as m; "
    "m.lend = numba.njit(lambda state, supply, paces_s, survival, due_s: np.zeros(len(supply.moments_s)))",
    "no charge for those to come": "import slos_serve.planning.arrivals as m; m.LOAD_OVER_S = 1e12",
    "no bound by TTFT": "import slos_serve.planning.arrivals as m; m.STEP_SHARE_OF_TTFT = 10.0",
    "no lead for best effort": "import slos_serve.planning.best_effort as m; m.LEAD_OF_STALL = -1.0",
    "no turns": "import slos_serve.planning.settings as m; m.PlannerSettings.__init__.__defaults__ = tuple("
    "0.0 if value == 10.0 else value for value in m.PlannerSettings.__init__.__defaults__)",
    "no wait for KV": "import slos_serve.planning.form as m; m.WAIT_SHARE = 2.0",
}


def run(name: str, profile: str, requests: int, seeds: Sequence[int]) -> dict[str, Any] | None:
    """Cells of one variant as ``benchmarks.heldout`` measures them; ``None`` when it failed."""
    code = f"{VARIANTS[name]}\nimport sys\nfrom benchmarks.heldout import main\nsys.exit(main(sys.argv[1:]))"
    asked = ["--profile", profile, "--requests", str(requests), "--seeds", *map(str, seeds)]
    asked += ["--tuning"] if max(seeds) < FIRST_TEST_SEED else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cells.json"
        command = [sys.executable, "-c", code, *asked, "--json", str(file)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=_environment(folder))
        if done.returncode:
            print(f"{name}: {done.stderr}", file=sys.stderr)
            return None
        return {"variant": name, "profile": profile, "cells": json.loads(file.read_text(encoding="utf-8"))}


def _environment(cache: str) -> dict[str, str]:
    return {**os.environ, "NUMBA_CACHE_DIR": cache}


def main(arguments: Sequence[str] | None = None) -> int:
    """One row a variant, on the page and in ``ablation.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=table_seeds(2))
    parser.add_argument("--profile", default="opt-13b-a100")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    with ThreadPoolExecutor(given.processes) as pool:
        found = list(
            pool.map(partial(run, profile=given.profile, requests=given.requests, seeds=given.seeds), VARIANTS)
        )
    rows = [row for row in found if row is not None]
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "ablation.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(tables.ablation(rows))
    return 1 if None in found else 0


if __name__ == "__main__":
    sys.exit(main())
