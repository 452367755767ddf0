"""How near the physical limit one replica serves, with unknown and with known output lengths, without speculation.

python -m benchmarks.lengths [--output benchmarks/results] [--requests 1500] [--seeds 3]

OPT-13B on A100, Poisson arrivals, SLOs-Serve alone: requests counted by class weight, and by their prompt's length.
"""

from __future__ import annotations

import json

from benchmarks._sim_commands import options, run_command, sizes

SCENARIOS = ("chat", "coding", "summarization", "mixed")
WEIGHTS = {"by request": "slos-serve", "by prompt length": "slos-serve:length_weight=1"}
LENGTHS = {"unknown": (), "known": ("--oracle-lengths",)}


def main() -> None:
    """Four searches a scenario; rows of all of them in one file."""
    given = options(__doc__, replicas=1, scenarios=SCENARIOS)
    scenarios = [part for name in given.scenario for part in ("--scenario", name)]
    rows = []
    for weight, policy in WEIGHTS.items():
        for lengths, switch in LENGTHS.items():
            part = given.output / "lengths-part.json"
            common = [*scenarios, "--policy", policy, "--arrivals", "poisson", *switch]
            common += sizes(given)
            run_command("capacity", *common, "--resume", str(given.output / "answers.jsonl"), "--json", str(part))
            rows += [{**row, "weight": weight, "lengths": lengths} for row in json.loads(part.read_text("utf-8"))]
            part.unlink()
    result = given.output / "lengths.json"
    result.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
