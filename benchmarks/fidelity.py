"""How far the simulator is off the real engine: the demo with a longer burst, then its requests in virtual time.

python -m benchmarks.fidelity [--burst-seconds 90] [--burst-load 1.2] [--profile FILE]

Prints a table a side (stock vLLM, SLOs-Serve) with the machine's speed taken from the calm phase, and one with the
profile as it is. Takes the machine for itself: about twelve minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks._sim_commands import RESULTS, run_command

SIDES = {"stock": "vllm", "slos_serve": "slos-serve"}


def main() -> None:
    """Record, then replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--burst-seconds", type=float, default=90.0)
    parser.add_argument("--burst-load", type=float, default=1.2)
    parser.add_argument("--calm-seconds", type=float, default=60.0)
    parser.add_argument("--record", type=Path, help="folder with records of an earlier run, instead of a new one")
    parser.add_argument("--profile", type=Path, help="the engine's profile; default: the cached one")
    given = parser.parse_args()
    folder = given.record or Path(tempfile.mkdtemp(prefix="slos-serve-fidelity-"))
    profile = ["--profile", str(given.profile)] if given.profile else []
    if given.record is None:
        run_command("demo", "--calm-seconds", str(given.calm_seconds), "--burst-seconds", str(given.burst_seconds),
                    "--burst-load", str(given.burst_load), "--record", str(folder), *profile)  # fmt: skip
    found = []
    for side, policy in SIDES.items():
        for speed in ("auto", "1"):
            result = folder / f"{side}-{speed}.json"
            run_command("replay", str(folder / f"{side}.jsonl"), "--profile", str(given.profile or cached(folder)),
                        "--policy", policy, "--max-num-seqs", "64", "--no-plan-ahead", "--speed", speed,
                        "--json", str(result))  # fmt: skip
            found.append({"side": side, **json.loads(result.read_text(encoding="utf-8"))})
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "fidelity.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def cached(folder: Path) -> Path:
    """The profile that the demo of this record used."""
    with (folder / "stock.jsonl").open(encoding="utf-8") as file:
        header = json.loads(file.readline())
    return Path(header["profile"])


if __name__ == "__main__":
    main()
