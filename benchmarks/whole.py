"""All of SLOs-Serve (speculation, routing) against the baselines as they are run by default, and at their best.

python -m benchmarks.whole [--scenario chat] [--replicas 4] [--requests 200] [--seeds 1] [--output benchmarks/results]

OPT-13B on A100, each scenario with its own arrivals. By default: no drafts, requests spread in turn, default
parameters. At their best: the draft model that SLOs-Serve has too at the best fixed length, requests to the least
loaded replica, the best parameters. SLOs-Serve asks mirrors of its replicas' planners. ``--requests`` counts those of
one replica.
"""

from __future__ import annotations

import json

from benchmarks._sim_commands import options, run_command, sizes
from slos_serve.policies.registry import POLICIES

DRAFTER = ("--drafter", "opt-125m", "--acceptance", "0.7")
DEFAULTS = ("vllm", "sarathi", "distserve")
TUNED = ("vllm", "vllm-v0", "sarathi", "distserve", "scorpio")


def default_of(policy: str) -> str:
    """The policy with its default parameters named, so that no others are tried."""
    given = POLICIES[policy].variants[0]
    return ":".join([policy, *([",".join(f"{name}={value}" for name, value in given.items())] if given else [])])


def main() -> None:
    """Three searches; rows of all of them in one file."""
    given = options(__doc__, replicas=4, requests=200, seeds=1)
    searches = {
        "default": (map(default_of, DEFAULTS), ["--router", "round-robin"]),
        "tuned": (TUNED, ["--router", "least-loaded", *DRAFTER]),
        "whole": (("slos-serve",), ["--router", "slo", *DRAFTER]),
    }
    scenarios = [part for name in given.scenario for part in ("--scenario", name)]
    rows = []
    for name, (policies, switches) in searches.items():
        part = given.output / "whole-part.json"
        common = [*scenarios, *(word for policy in policies for word in ("--policy", policy)), *switches]
        common += ["--arrivals", "scenario", "--replicas", str(given.replicas), *sizes(given)]
        run_command("capacity", *common, "--resume", str(given.output / "answers.jsonl"), "--json", str(part))
        rows += [{**row, "run": name} for row in json.loads(part.read_text(encoding="utf-8"))]
        part.unlink()
    (given.output / "whole.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
