"""Capacity of every policy on the six scenarios, OPT-13B on A100: the table of docs/benchmarks.md.

python -m benchmarks.capacity_table [--replicas 1] [--output benchmarks/results] [--drafter opt-125m] [--acceptance 0.7]
"""

from __future__ import annotations

from benchmarks._sim_commands import options, run_command, sizes, speculation


def main() -> None:
    """Search, then draw."""
    given = options(__doc__, replicas=1, drafters=True)
    result = given.output / ("capacity.json" if given.drafter == "none" else "capacity-speculative.json")
    policies = ("vllm", "vllm-v0", "sarathi", "distserve", "scorpio", "slos-serve")
    chosen = [part for name in policies for part in ("--policy", name)]
    common = ["--scenario", "all", *chosen, "--profile", "opt-13b-a100", "--arrivals", "scenario"]
    common += ["--replicas", str(given.replicas), *sizes(given), *speculation(given)]
    run_command("capacity", *common, "--resume", str(given.output / "answers.jsonl"), "--json", str(result))
    run_command("report", str(result))


if __name__ == "__main__":
    main()
