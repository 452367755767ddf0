"""Write the tables of docs/benchmarks.md from the stored results.

python -m benchmarks.tables [--results benchmarks/results] [--page docs/benchmarks.md]

Each table of the page stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; one whose result is not there is
left as it is. The other scripts of this folder make the results.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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
    """The matrix' cells of OPT-13B/A100 with own arrivals: ours and the best rivals, then who is served at capacity."""
    lines, quartiles = [], []
    for row in rows:
        if (row["engine"], row["arrivals"]) != ("opt-13b-a100", "scenario") or row.get("flat"):
            continue  # of a flat cell there are shares and no capacity
        ours, *rivals = row["capacities"]
        rivals.sort(key=lambda one: -float(one["capacity_rps_per_gpu"]))
        named = [f"{one['policy']} {_capacity_cell(one)}" for one in rivals]
        bound = ours["fluid_bound_rps_per_gpu"] / 0.9
        lines.append([row["scenario"], _capacity_cell(ours), *(named + ["-"] * 3)[:3], f"{bound:.3g}"])
        quartiles.append([row["scenario"], _quartiles(ours), f"{rivals[0]['policy']} {_quartiles(rivals[0])}"])
    parts = [table(["scenario", "slos-serve", "best rival", "second", "third", "fluid bound / 0.9"], lines)]
    parts.append("Attainment at capacity by quartile of prompt length, short to long (%):")
    parts.append(table(["scenario", "slos-serve", "best rival"], quartiles))
    return "\n\n".join(parts)


def _capacity_cell(row: dict[str, Any]) -> str:
    """By the mean with its interval / with every token in time."""
    low, high = row["ci"]
    return f"{row['capacity_rps_per_gpu']:.3g} ({low:.2g}-{high:.2g}) / {row['strict_rps_per_gpu']:.3g}"


def _quartiles(row: dict[str, Any]) -> str:
    return " ".join(f"{100 * share:.0f}" for share in row["by_prompt_quartile"])


def scaling(rows: Rows) -> str:
    """Capacity per GPU by scenario, router and replicas, then what the last router carries over the others."""
    counts = sorted({int(row["replicas"]) for row in rows})
    found = {(row["scenario"], row["router"], int(row["replicas"])): row["capacity_rps_per_gpu"] for row in rows}
    lines = []
    for scenario in unique(rows, "scenario"):
        for router in unique(rows, "router"):
            own = [found.get((scenario, router, count)) for count in counts]
            cells = ["" if value is None else f"{value:.3g}" for value in own]
            first, last = own[0], own[-1]
            lines.append([scenario, router, *cells, f"{last / first:.2f}" if first and last else ""])
    parts = [table(["scenario", "router", *map(str, counts), f"{counts[-1]} replicas over 1"], lines)]
    *others, best = unique(rows, "router")
    scenarios = unique(rows, "scenario")
    shared = [count for count in counts if count > 1 and all((one, best, count) in found for one in scenarios)]
    for other in others:
        over = [_geometric_mean([found[one, best, n] / found[one, other, n] for one in scenarios]) for n in shared]
        told = ", ".join(f"{ratio:.2f}x at {count}" for ratio, count in zip(over, shared, strict=True))
        parts.append(f"- {best} over {other}: {told} (geometric mean of {len(scenarios)} scenarios)")
    return "\n\n".join([parts[0], "\n".join(parts[1:])])


def whole(rows: Rows) -> str:
    """Capacity of everything together, of baselines by default and at their best, and the ratios."""
    ours = {row["scenario"]: float(row["capacity_rps_per_gpu"]) for row in rows if row["run"] == "whole"}
    others = [row for row in rows if row["run"] != "whole"]
    columns = list(dict.fromkeys((row["run"], row["policy"].partition(":")[0]) for row in others))
    found = {
        (row["run"], row["policy"].partition(":")[0], row["scenario"]): float(row["capacity_rps_per_gpu"])
        for row in others
    }
    lines = []
    for scenario, own in ours.items():
        lines.append([scenario, f"{own:.3g}", *(f"{found[(*column, scenario)]:.3g}" for column in columns)])
    means = [_geometric_mean([own / found[(*column, one)] for one, own in ours.items()]) for column in columns]
    lines.append(["SLOs-Serve over it", "", *(f"{mean:.2f}x" for mean in means)])
    best = [max(found[("tuned", name, one)] for run, name in columns if run == "tuned") for one in ours]
    over_best = _geometric_mean([own / other for own, other in zip(ours.values(), best, strict=True)])
    head = ["requests/s per GPU", "slos-serve", *(f"{name}, {run}" for run, name in columns)]
    return f"{table(head, lines)}\n\n- over the best of each scenario: {over_best:.2f}x"


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def ablation(rows: Rows) -> str:
    """Attained and every token in time of each variant, %."""
    scenarios = list(rows[0]["cells"])
    lines = []
    for row in rows:
        pairs = [[100 * row["cells"][one][name] for name in ("attained", "strict")] for one in scenarios]
        means = [sum(values) / len(values) for values in zip(*pairs, strict=True)]
        lines.append([row["variant"], *(f"{mean:.1f} / {strict:.1f}" for mean, strict in (*pairs, means))])
    return table(["attained / every token, %", *scenarios, "mean"], lines)


def ideal(rows: Rows) -> str:
    """Rates at which an ideal engine promises 90 %, by whom it promises."""
    rules = unique(rows, "promises")
    found = {(row["scenario"], row["promises"]): row for row in rows}
    lines = []
    for scenario in unique(rows, "scenario"):
        own = [found[scenario, rule] for rule in rules]
        lines.append([scenario, *(f"{row['capacity_rps_per_gpu']:.3g} ({row['share']:.2f})" for row in own)])
    return table(["requests/s per GPU (share of fluid / 0.9)", *rules], lines)


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
        lines.append([f"{row['rate_rps']:,.0f}", row["router"], str(row["routers"]), str(row["tries"]), *shares, times])
    return table(
        ["requests/s", "router", "routers", "others asked", "attained", "of the promised", "decision p50 / p99 ms"],
        lines,
    )


def matrix(rows: Rows) -> str:
    """Ours over the best rival of each cell."""
    from benchmarks.matrix import table as matrix_table

    return matrix_table(rows)


def overload(rows: Rows) -> str:
    """Long overload beside stock."""
    from benchmarks.overload import HEAD, Row, line

    return table(HEAD, [line(Row(**row)) for row in rows])


def published(rows: Rows) -> str:
    """Share of requests kept by every policy, and ours over the best rival that knows no true lengths."""
    from benchmarks.published import COMPARED, over_best, rows_of

    found = rows_of(rows)
    names = list(dict.fromkeys(case.name for case, _ in found))
    lines = []
    for place in dict.fromkeys((case.workload, case.engine, case.rate_rps) for case, _ in found):
        here = [(case, one) for case, one in found if (case.workload, case.engine, case.rate_rps) == place]
        kept = {case.name: f"{100.0 * one.kept:.1f}" for case, one in here}
        over = [f"{over_best(here, column)[0]:.2f}" for column in COMPARED.values()]
        lines.append([place[0], place[1], f"{place[2]:g}", *(kept.get(name, "-") for name in names), *over])
    head = ["workload", "engine", "requests/s", *(f"{name}, %" for name in names)]
    return table([*head, *(f"{label} / best" for label in COMPARED)], lines)


def worlds(rows: Rows) -> str:
    """The worlds in which ours is furthest behind, and a summary."""
    from benchmarks.worlds import table as worlds_table

    return worlds_table(rows)


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "capacity": ("matrix.json", capacity),
    "whole": ("whole.json", whole),
    "ideal-1": ("ideal-1-poisson-none.json", ideal),
    "ideal-4": ("ideal-4-scenario-opt-125m.json", ideal),
    "scaling": ("scaling.json", scaling),
    "ablation": ("ablation.json", ablation),
    "burst10": ("burst10.json", burst),
    "burst-azure": ("burst-azure.json", burst),
    "scale": ("scale.json", scale),
    "matrix": ("matrix.json", matrix),
    "worlds": ("worlds.json", worlds),
    "published": ("published.json", published),
    "overload": ("overload-opt-13b-a100.json", overload),
}


def _filled(made: str, match: re.Match[str]) -> str:
    """The block of a table with what was made between its marks."""
    return f"{match[1]}{made}\n{match[2]}"


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
        count = len(block.findall(text))
        text = block.sub(partial(_filled, made), text)
        print(f"table {name}: {'written' if count else 'not on the page'}")
    given.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
