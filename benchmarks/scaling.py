"""Capacity per GPU at 1, 2, 4 and 8 replicas for each scenario and router: the scaling figure.

python -m benchmarks.scaling [--output benchmarks/results]
"""

from __future__ import annotations

import json

from benchmarks._sim_commands import options, run_command


def main() -> None:
    """One search a number of replicas; rows of all of them in one file."""
    given = options(__doc__, replicas=8)
    rows = []
    for router in ("round-robin", "least-loaded"):
        for replicas in (count for count in (1, 2, 4, 8) if count <= given.replicas):
            part = given.output / f"scaling-{router}-{replicas}.json"
            common = ["--scenario", "all", "--policy", "slos-serve", "--policy", "vllm", "--router", router]
            common += ["--replicas", str(replicas), "--requests", str(given.requests)]
            run_command("capacity", *common, "--resume", str(given.output / "answers.jsonl"), "--json", str(part))
            rows += [{**row, "router": router} for row in json.loads(part.read_text(encoding="utf-8"))]
    result = given.output / "scaling.json"
    result.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    run_command("report", str(result))


if __name__ == "__main__":
    main()
