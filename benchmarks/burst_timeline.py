"""A burst of ten times the capacity, and Azure's own bursts, policy by policy: the burst figures.

python -m benchmarks.burst_timeline [--scenario coding] [--output benchmarks/results]

The first figure: 4 replicas at half of their capacity, and for 20 s in the middle at ten times it. The second: arrivals
as in Azure's coding trace.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks._sim_commands import options, run_command
from slos_serve.sim.seeds import check_test

POLICIES = ("vllm:token_budget=8192", "sarathi:chunk_tokens=512", "scorpio", "edf", "qoserve", "slos-serve")
# Requests/s of ``coding`` that one replica carries at 90 % attainment, Poisson arrivals: about the best baseline's.
CAPACITY_RPS = 3.0
SEED = 30
CALM_PART, BURST_PART, TOTAL_S, BURST_SHARE = 0.5, 10.0, 100.0, 0.2


def main() -> None:
    """The same requests through each policy, drawn over each other."""
    check_test([SEED])
    given = options(__doc__, replicas=4, rate=6.0, requests=1500, scenarios=("coding",))
    mean = given.replicas * CAPACITY_RPS * (CALM_PART * (1.0 - BURST_SHARE) + BURST_PART * BURST_SHARE)
    runs = {
        "burst10": (f"burst:{BURST_PART / CALM_PART:g}", mean, round(mean * TOTAL_S)),
        "burst-azure": ("azure-code", given.rate, given.requests),
    }
    for name, (arrivals, rate, requests) in runs.items():
        files = [given.output / f"{name}-{policy.partition(':')[0]}.json" for policy in POLICIES]
        for policy, file in zip(POLICIES, files, strict=True):
            router = "slo" if policy == "slos-serve" else "least-loaded"
            common = ["--scenario", given.scenario[0], "--arrivals", arrivals, "--rate", f"{rate:g}"]
            common += ["--policy", policy, "--replicas", str(given.replicas), "--router", router]
            run_command("simulate", *common, "--requests", str(requests), "--seed", str(SEED), "--json", str(file))
        run_command("report", *map(str, files), "--output", str(given.output / f"{name}.html"))
        together(files, given.output / f"{name}.json")


def together(files: list[Path], result: Path) -> None:
    """One file in place of one a policy."""
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    result.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    for file in files:
        file.unlink()


if __name__ == "__main__":
    main()
