"""What drafts add to SLOs-Serve: capacity with a draft model and with n-grams over that without, one replica.

python -m benchmarks.speculation [--scenario chat] [--requests 600] [--seeds 1] [--output benchmarks/results]

OPT-13B on A100, each scenario with its own arrivals, the same requests for all three. The draft model (OPT-125M's cost)
is right seven times in ten, n-grams as often as on prose: 0.11. Exits 1 when the geometric mean of the former is under
1.4 or that of the latter under 0.98.
"""

from __future__ import annotations

import json
import math
import sys

from benchmarks._sim_commands import options, run_command, sizes

# Name of the row -> drafter, probability that a draft token is right.
DRAFTERS = {"none": ("none", 0.7), "draft model, 0.7": ("opt-125m", 0.7), "n-grams, 0.11": ("ngram", 0.11)}
LEAST = {"draft model, 0.7": 1.4, "n-grams, 0.11": 0.98}


def main() -> int:
    """One search a drafter; rows of all of them in one file."""
    given = options(__doc__, replicas=1, scenarios=("all",))
    scenarios = [part for name in given.scenario for part in ("--scenario", name)]
    rows = []
    for name, (drafter, acceptance) in DRAFTERS.items():
        part = given.output / "speculation-part.json"
        common = [*scenarios, "--policy", "slos-serve", "--arrivals", "scenario", "--replicas", str(given.replicas)]
        common += ["--drafter", drafter, "--acceptance", str(acceptance), *sizes(given)]
        run_command("capacity", *common, "--resume", str(given.output / "answers.jsonl"), "--json", str(part))
        rows += [{**row, "drafts": name} for row in json.loads(part.read_text(encoding="utf-8"))]
        part.unlink()
    (given.output / "speculation.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    found = {(row["drafts"], row["scenario"]): row["capacity_rps_per_gpu"] for row in rows}
    short = False
    for name, least in LEAST.items():
        over = [value / found["none", scenario] for (drafts, scenario), value in found.items() if drafts == name]
        mean = math.exp(sum(map(math.log, over)) / len(over))
        print(f"{name}: {mean:.2f} times the capacity without (geometric mean of {len(over)}; wanted {least})")
        short |= mean < least
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
