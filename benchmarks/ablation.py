"""Attained with one idea of the planner off at a time: each variant is a patch of one function or constant.

    python -m benchmarks.ablation [--requests 400] [--seeds 20 21]

At the rates of ``benchmarks.heldout``; patches live here, the planner has no switches for them. Kernels are compiled
anew for each variant, in a process of its own and without a cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

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


def main(arguments: Sequence[str] | None = None) -> int:
    """One table a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", default="400")
    parser.add_argument("--seeds", nargs="+", default=["20", "21"])
    given = parser.parse_args(arguments)
    failed = 0
    for name, patch in VARIANTS.items():
        print(f"== {name}", flush=True)
        code = f"{patch}\nimport sys\nfrom benchmarks.heldout import main\nsys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "--tuning", "--requests", given.requests, "--seeds", *given.seeds]
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(command, check=False, env={**os.environ, "NUMBA_CACHE_DIR": folder})
        failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
