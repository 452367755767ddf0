"""Write the tables of docs/benchmarks.md from the stored results.

python -m benchmarks.tables [--results benchmarks/results] [--page docs/benchmarks.md]

Each table of the page stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; one whose result is not there is
left as it is. The other scripts of this folder make the results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._sim_commands import RESULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
Rows = list[dict[str, Any]]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def unique(rows: Rows, name: str) -> list[str]:
    """Values of a column in order of first appearance."""
    return list(dict.fromkeys(str(row[name]) for row in rows))


def capacity(rows: Rows) -> str:
    """Capacity by scenario and policy, then geometric means, then who is served at capacity."""
    from slos_serve.cli.capacity import geometric_mean_ratios

    policies = unique(rows, "policy")
    found = {(row["scenario"], row["policy"]): row for row in rows}
    lines, quartiles = [], []
    for scenario in unique(rows, "scenario"):
        own = [found.get((scenario, policy)) for policy in policies]
        bound = next(row for row in own if row)["fluid_bound_rps_per_gpu"] / 0.9
        lines.append([scenario, *(_capacity_cell(row) for row in own), f"{bound:.2f}"])
        quartiles.append([scenario, *(_quartiles(row) for row in own)])
    parts = [table(["scenario", *policies, "fluid bound / 0.9"], lines)]
    given = {(row["scenario"], row["policy"]): float(row["capacity_rps_per_gpu"]) for row in rows}
    parts.append("\n".join(f"- {line}" for line in geometric_mean_ratios(given)))
    parts.append("Attainment at capacity by quartile of prompt length, short to long (%):")
    parts.append(table(["scenario", *policies], quartiles))
    return "\n\n".join(parts)


def _capacity_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    digits = 2 if row["capacity_rps_per_gpu"] >= 0.1 else 3
    return f"{row['capacity_rps_per_gpu']:.{digits}f} ({row['ci'][0]:.{digits}f}-{row['ci'][1]:.{digits}f})"


def _quartiles(row: dict[str, Any] | None) -> str:
    return "" if row is None else " ".join(f"{100 * share:.0f}" for share in row["by_prompt_quartile"])


def scaling(rows: Rows) -> str:
    """Capacity per GPU by scenario, router and number of replicas."""
    counts = sorted({int(row["replicas"]) for row in rows})
    found = {(row["scenario"], row["router"], int(row["replicas"])): row["capacity_rps_per_gpu"] for row in rows}
    lines = []
    for scenario in unique(rows, "scenario"):
        for router in unique(rows, "router"):
            own = [found.get((scenario, router, count)) for count in counts]
            cells = ["" if value is None else f"{value:.2f}" for value in own]
            first, last = own[0], own[-1]
            lines.append([scenario, router, *cells, f"{last / first:.2f}" if first and last else ""])
    return table(["scenario", "router", *map(str, counts), f"{counts[-1]} replicas over 1"], lines)


def ablation(rows: Rows) -> str:
    """Capacity of each variant over that of all ideas together."""
    variants, scenarios = unique(rows, "variant"), unique(rows, "scenario")
    found = {(row["variant"], row["scenario"]): float(row["capacity_rps_per_gpu"]) for row in rows}
    lines = []
    for variant in variants:
        own = [found.get((variant, scenario)) for scenario in scenarios]
        lines.append([variant, *("" if value is None else f"{value:.2f}" for value in own)])
    return table(["requests/s per GPU", *scenarios], lines)


def lengths(rows: Rows) -> str:
    """Share of the fluid bound that is reached, with unknown and with known lengths."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["weight"] != rows[0]["weight"], row["scenario"])):
        share = 0.9 * row["capacity_rps_per_gpu"] / row["fluid_bound_rps_per_gpu"]
        kept = f"{100 * row['admitted_attained']:.1f} %"
        lines.append(
            [row["weight"], row["scenario"], row["lengths"], _capacity_cell(row), f"{share:.3f}", kept, _quartiles(row)]
        )
    head = ["weight", "scenario", "lengths", "requests/s", "share of fluid / 0.9", "of the promised", "by quartile (%)"]
    return table(head, lines)


def burst(rows: Rows) -> str:
    """Who attained in a burst."""
    lines = []
    for row in rows:
        promised = f"{row['admitted_attained']} of {row['admitted']}" if row["admitted"] else "promises nothing"
        lines.append([row["policy"], f"{row['attained']} of {row['requests']}", promised, str(row["rejected"])])
    return table(["policy", "attained", "of those promised", "rejected"], lines)


def scale(rows: Rows) -> str:
    """One router against many."""
    lines = []
    for row in rows:
        cost = row["decision_ms"]
        times = "-" if cost["p50"] is None else f"{cost['p50']:.2f} / {cost['p99']:.2f}"
        shares = [f"{100 * row[name]:.1f} %" for name in ("attained", "admitted_attained")]
        lines.append([row["router"], str(row["routers"]), str(row["tries"]), *shares, times])
    return table(["router", "routers", "others asked", "attained", "of the promised", "decision p50 / p99 ms"], lines)


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "capacity": ("capacity.json", capacity),
    "capacity-speculative": ("capacity-speculative.json", capacity),
    "lengths": ("lengths.json", lengths),
    "scaling": ("scaling.json", scaling),
    "ablation": ("ablation.json", ablation),
    "burst10": ("burst10.json", burst),
    "burst-azure": ("burst-azure.json", burst),
    "scale": ("scale.json", scale),
}


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    text = given.page.read_text(encoding="utf-8")
    for name, (file, make) in TABLES.items():
        path = given.results / file
        if not path.is_file():
            print(f"no {file}: table {name} is left as it is")
            continue
        made = make(json.loads(path.read_text(encoding="utf-8")))
        block = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = block.subn(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
        print(f"table {name}: {'written' if count else 'not on the page'}")
    given.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
