"""Writes docs/settings.md from the planner's own settings: ``python scripts/render_settings.py``."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from slos_serve.planning.settings import RANGES, PlannerSettings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """# Settings of the planner

Written by `python scripts/render_settings.py` from `src/slos_serve/planning/settings.py`. Every setting can be given in
the class file's section `scheduler:`; a value out of range is an error that names the file and the line.

```yaml
classes:
  chat: {ttft_ms: 1500, tpot_ms: 50}
scheduler:
  margin: 0.1
  aging_s: 30
```

| setting | default | allowed | meaning |
|---|---|---|---|
"""


def rendered() -> str:
    """The page."""
    text = inspect.getdoc(PlannerSettings) or ""
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text.split("Attributes:")[1], flags=re.MULTILINE)
    meaning = {name: " ".join(line.split()) for name, line in entries}
    rows = []
    for entry in fields(PlannerSettings):
        low, high, low_included = RANGES[entry.name]
        allowed = f"{'[' if low_included else '('}{low:g}, {high:g}]"
        rows.append(f"| `{entry.name}` | {entry.default:g} | {allowed} | {meaning[entry.name]} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(rendered(), encoding="utf-8")
