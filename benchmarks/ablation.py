"""Capacity with one idea of the planner off at a time: the ablation figure.

python -m benchmarks.ablation [--output benchmarks/results] [--drafter opt-125m] [--acceptance 0.7]

With a drafter in the engine every variant plans drafts but those that are about them.
"""

from __future__ import annotations

import json

from benchmarks._sim_commands import options, run_command, sizes, speculation

VARIANTS = {
    "all ideas": "slos-serve",
    "no DP admission": "slos-serve:dp_admission=false",
    "fixed batch of 512": "slos-serve:dynamic_batch=false,fixed_budget=512",
    "no holding": "slos-serve:hold_decodes=false",
    "no best effort": "slos-serve:best_effort=false",
}
# Only where the engine has a drafter.
DRAFT_VARIANTS = {
    "no drafts": "slos-serve:max_draft_tokens=0",
    "everyone drafts 4": "slos-serve:max_draft_tokens=4,adaptive_drafts=false",
}


def main() -> None:
    """One search a variant; rows of all of them in one file, each with its variant."""
    given = options(__doc__, replicas=1, drafters=True)
    variants = VARIANTS if given.drafter == "none" else {**VARIANTS, **DRAFT_VARIANTS}
    scenarios = [part for name in given.scenario for part in ("--scenario", name)]
    rows = []
    for name, policy in variants.items():
        part = given.output / f"ablation-{name.replace(' ', '-')}.json"
        common = [*scenarios, "--policy", policy, "--replicas", str(given.replicas), *speculation(given)]
        common += sizes(given)
        common += ["--resume", str(given.output / "answers.jsonl")]
        run_command("capacity", *common, "--json", str(part))
        rows += [{**row, "variant": name} for row in json.loads(part.read_text(encoding="utf-8"))]
        part.unlink()
    result = given.output / "ablation.json"
    result.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    run_command("report", str(result))


if __name__ == "__main__":
    main()
