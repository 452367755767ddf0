"""Speed of the simulator: 100,000 chat requests on 4 replicas, under stock vLLM's order and under SLOs-Serve.

python -m benchmarks.simulator_speed
"""

from __future__ import annotations

import resource

from benchmarks._sim_commands import options, run_command


def main() -> None:
    """Run both, and print the memory that they took: the difference is what planning costs."""
    given = options(__doc__, replicas=4, rate=8.0, requests=100_000)
    common = ["--scenario", "chat", "--arrivals", "poisson", "--rate", str(given.rate)]
    for policy in ("vllm", "slos-serve"):
        run_command("simulate", *common, "--policy", policy, "--replicas", str(given.replicas),
                    "--requests", str(given.requests))  # fmt: skip
    print(f"peak memory {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
