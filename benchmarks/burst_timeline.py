"""p99 latency and batch sizes through Azure's bursts, policy by policy: the burst figure.

python -m benchmarks.burst_timeline [--rate 6] [--output benchmarks/results]
"""

from __future__ import annotations

from benchmarks._sim_commands import options, run_command

POLICIES = ("vllm:token_budget=8192", "sarathi:chunk_tokens=512", "scorpio", "slos-serve")


def main() -> None:
    """The same requests through each policy, drawn over each other."""
    given = options(__doc__, replicas=4, rate=6.0)
    files = []
    for policy in POLICIES:
        file = given.output / f"burst-{policy.partition(':')[0]}.json"
        common = ["--scenario", "coding", "--arrivals", "azure-code", "--rate", str(given.rate), "--policy", policy]
        common += ["--replicas", str(given.replicas), "--requests", str(given.requests)]
        run_command("simulate", *common, "--json", str(file))
        files.append(str(file))
    run_command("report", *files, "--output", str(given.output / "burst.html"))


if __name__ == "__main__":
    main()
