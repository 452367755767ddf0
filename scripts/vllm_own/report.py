"""What of vLLM's own tests fails with ours and not on stock, and which of it is explained.

python scripts/vllm_own/report.py WORK EXPLAINED.json [--markdown]

``explained.json`` maps part of a test's name to why its failure is right. Exits 1 for a failure that is not in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

MODES = ("bare", "profile", "promise")


def failures(work: Path, mode: str) -> dict[str, str]:
    """Test -> last line of its failure."""
    file = work / f"failures-{mode}.jsonl"
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {line["test"]: line["error"] for line in lines}


def reason(test: str, mode: str, error: str, explained: Sequence[dict[str, str]]) -> str:
    """Why a failure is right; empty when nobody has said so."""
    for entry in explained:
        wanted = entry.get("test", "") in test and entry.get("error", "") in error
        if wanted and mode in entry.get("modes", " ".join(MODES)):
            return entry["reason"]
    return ""


def main(arguments: Sequence[str]) -> int:
    """Print the list; 1 when something is not explained."""
    work, explained_file = Path(arguments[0]), Path(arguments[1])
    explained = json.loads(explained_file.read_text(encoding="utf-8"))
    stock = failures(work, "stock")
    found: dict[str, list[str]] = {}
    why: dict[str, str] = {}
    bad = 0
    for mode in MODES:
        for test, error in failures(work, mode).items():
            if test in stock:
                continue
            found.setdefault(test, []).append(mode)
            told = reason(test, mode, error, explained)
            bad += not told
            why[test] = told or f"UNEXPLAINED: {error}"
    if "--markdown" in arguments:
        print("| vLLM's test | fails with | reason |\n|---|---|---|")
        for test, modes in sorted(found.items()):
            print(f"| `{test.partition('::')[2]}` | {', '.join(modes)} | {why[test]} |")
    else:
        for test, modes in sorted(found.items(), key=lambda item: why[item[0]]):
            print(f"{','.join(modes):22} {test}\n    {why[test]}")
        print(f"stock itself fails {len(stock)}; ours fails {len(found)} more, {bad} not explained")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
