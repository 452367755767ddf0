"""Capacity per GPU at 1, 2, 4 and 8 replicas by router: the scaling figure.

python -m benchmarks.scaling [--scenario coding --scenario tool] [--count 8] [--requests 250] [--seeds 1]

Three ways to spread requests over replicas that all run SLOs-Serve: in turn, to the least loaded, and by asking mirrors
of the replicas' planners. ``--requests`` counts those of one replica. What is not run again
(a scenario, a number of replicas) keeps its rows.
"""

from __future__ import annotations

import json

from benchmarks._sim_commands import SIX, options, run_command, sizes

COUNTS = (1, 2, 4, 8)
ROUTERS = ("round-robin", "least-loaded", "slo")


def main() -> None:
    """One search a router and number of replicas; rows of all of them in one file."""
    given = options(__doc__, replicas=1, requests=250, seeds=1, counts=COUNTS)
    chosen = [part for name in given.scenario for part in ("--scenario", name)]
    rows = []
    for replicas in given.count:
        # One replica leaves a router nothing to choose, but mirrors may still take another order of arrival.
        for router in ROUTERS if replicas > 1 else ROUTERS[:1]:
            part = given.output / f"scaling-{router}-{replicas}.json"
            common = [*chosen, "--policy", "slos-serve", "--router", router, "--replicas", str(replicas)]
            common += sizes(given)
            run_command("capacity", *common, "--resume", str(given.output / "answers.jsonl"), "--json", str(part))
            found = json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
            rows += [{**row, "router": name} for name in (ROUTERS if replicas == 1 else (router,)) for row in found]
    result = given.output / "scaling.json"
    if result.exists():
        for row in json.loads(result.read_text(encoding="utf-8")):
            if row["scenario"] not in given.scenario or row["replicas"] not in given.count:
                rows.append(row)
        rows.sort(key=lambda row: (SIX.index(row["scenario"]), ROUTERS.index(row["router"]), row["replicas"]))
    result.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    run_command("report", str(result))


if __name__ == "__main__":
    main()
