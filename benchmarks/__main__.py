"""``python -m benchmarks [NAME ...]``: run benchmarks of this folder, one process each; ``make bench`` calls it.

Without names it runs those of ``DEFAULT``, which need no GPU and a few minutes; ``--list`` prints all there are.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DEFAULT = ("planner", "overhead")


def available() -> dict[str, str]:
    """Name of each benchmark -> the first line of its docstring."""
    scripts = sorted(path for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
    docstrings = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in scripts}
    return {name: (text or "").partition("\n")[0] for name, text in docstrings.items()}


def run(name: str) -> int:
    """Run one benchmark with its output shown; its exit status."""
    print(f"== {name}", flush=True)
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=FOLDER.parent, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """Run the named benchmarks (all of them, even when one fails); 1 if any failed, 2 for a name there is not."""
    known = available()
    if "--list" in arguments:
        for name, what in known.items():
            print(f"{name:12} {what}")
        return 0
    names = list(arguments) or [name for name in DEFAULT if name in known]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        print(
            f"no benchmark {', '.join(unknown) or 'yet'}; there are: {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    failed = [name for name in names if run(name) != 0]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
