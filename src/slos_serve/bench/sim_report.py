"""One self-contained page for simulation results, and a PNG file a chart.

Reads what ``capacity`` and ``simulate`` write. A list of capacity rows gives capacity by scenario, attainment against
rate, scaling when there are several numbers of replicas, and ablation when rows carry a ``variant``. A run gives p99
latency over time and batch sizes over time; several runs in one list lie over each other.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.io as pio

from slos_serve.bench.charts import Chart, Series, plotly_figure
from slos_serve.core.errors import InvalidFieldError

Row = Mapping[str, Any]


def charts_of(result: object, where: str = "result") -> list[Chart]:
    """Charts that a result holds.

    Raises:
        InvalidFieldError: neither capacity rows nor runs.
    """
    given = result if isinstance(result, list) else [result]
    rows: list[Row] = [row for row in given if isinstance(row, Mapping)]
    if not rows or len(rows) < len(given):
        raise InvalidFieldError("result", type(result).__name__, "JSON that capacity or simulate wrote", where)
    if all("capacity_rps_per_gpu" in row for row in rows):
        return capacity_charts(rows)
    if all("timeline" in row for row in rows):
        return run_charts(rows)
    raise InvalidFieldError("result", sorted(rows[0])[:5], "JSON that capacity or simulate wrote", where)


def capacity_charts(rows: Sequence[Row]) -> list[Chart]:
    """Capacity by scenario; scaling; ablation; attainment against rate for each scenario."""
    charts = []
    replicas = sorted({int(row["replicas"]) for row in rows})
    if len({row.get("variant") for row in rows}) > 1:
        charts.append(_bars("ablation", "Ablation: capacity with one idea off", rows, "variant"))
    elif len(replicas) > 2 and len({row["policy"] for row in rows}) <= 4:
        charts.append(_scaling(rows))
    else:
        charts.append(_bars("capacity", "Capacity at the target attainment", rows, "policy"))
    for scenario in dict.fromkeys(str(row["scenario"]) for row in rows):
        own = [row for row in rows if row["scenario"] == scenario and row.get("curve")]
        series = [
            Series(_label(row), [rate for rate, _ in row["curve"]], [100.0 * share for _, share in row["curve"]])
            for row in own
        ]
        title = f"{scenario}: attainment against rate"
        labels = ("requests/s per GPU", "requests that attain (%)")
        charts.append(Chart(f"attainment-{scenario}", title, *labels, series, marks=(("90 %", 90.0),)))
    return charts


def run_charts(rows: Sequence[Row]) -> list[Chart]:
    """Latency, attainment and batches over time."""
    of_target = "times the target (p99)"
    wanted = (
        ("arrivals", "Arrivals", "arrivals_rps", "requests/s", False),
        ("ttft-promised", "Time to first token of what was promised", "ttft_of_target_p99", of_target, True),
        ("tpot-promised", "Time per output token of what was promised", "tpot_of_target_p99", of_target, True),
        ("promised", "Promised requests, by arrival", "promised_rps", "requests/s", False),
        ("ttft", "p99 time to first token of all, by arrival", "ttft_p99_ms", "ms", True),
        ("tpot", "p99 time per output token of all, by arrival", "tpot_p99_ms", "ms", False),
        ("attained", "Share that attained, by arrival", "attained", "share", False),
        ("batch-tokens", "Batch size", "batch_tokens", "tokens a step (mean)", False),
        ("waiting", "Waiting requests", "waiting", "requests (mean)", False),
        ("kv-blocks", "KV blocks in use", "used_blocks", "blocks (mean)", False),
    )
    charts = []
    for key, title, column, unit, log_y in wanted:
        some = rows[:1] if key == "arrivals" else rows
        series = [Series(_label(row), row["timeline"]["t_s"], row["timeline"].get(column, [])) for row in some]
        marks = (("target", 1.0),) if unit == of_target else ()
        charts.append(Chart(f"timeline-{key}", title, "virtual seconds", unit, series, marks=marks, log_y=log_y))
    return charts


def page(title: str, charts: Sequence[Chart], rows: Sequence[Row]) -> str:
    """A self-contained HTML page: charts, then the numbers."""
    parts = []
    for index, chart in enumerate(charts):
        parts.append(pio.to_html(plotly_figure(chart), full_html=False, include_plotlyjs=index == 0))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts)
        + _numbers(rows)
        + "</body></html>\n"
    )


_STYLE = (
    "body{font-family:system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
)
_COLUMNS = ("scenario", "workload", "policy", "variant", "replicas", "arrivals", "capacity_rps_per_gpu", "ci")
_MORE_COLUMNS = ("attainment", "admitted_attained", "fluid_bound_rps_per_gpu", "by_prompt_quartile", "parameters")


def _numbers(rows: Sequence[Row]) -> str:
    columns = [name for name in (*_COLUMNS, *_MORE_COLUMNS) if any(name in row for row in rows)]
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in columns) + "</tr>" for row in rows)
    return f"<h2>Numbers</h2><table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return html.escape("" if value is None else str(value))


def _label(row: Row) -> str:
    variant = row.get("variant")
    return f"{row['policy']}, {variant}" if variant else str(row["policy"])


def _bars(key: str, title: str, rows: Sequence[Row], group: str) -> Chart:
    series = []
    for name in dict.fromkeys(str(row.get(group)) for row in rows):
        own = [row for row in rows if str(row.get(group)) == name]
        series.append(
            Series(
                name,
                [str(row["scenario"]) for row in own],
                [float(row["capacity_rps_per_gpu"]) for row in own],
                [float(row["ci"][0]) for row in own],
                [float(row["ci"][1]) for row in own],
            )
        )
    return Chart(key, title, "", "requests/s per GPU", series, kind="bars")


def _scaling(rows: Sequence[Row]) -> Chart:
    """Capacity per GPU over that of one replica: a colour a scenario, dashes for routers."""
    series, several = [], len({row["policy"] for row in rows}) > 1
    for name in dict.fromkeys((str(row["scenario"]), str(row["policy"]), str(row.get("router", ""))) for row in rows):
        own = [row for row in rows if (str(row["scenario"]), str(row["policy"]), str(row.get("router", ""))) == name]
        own.sort(key=lambda row: int(row["replicas"]))
        counts = [float(row["replicas"]) for row in own]
        alone = float(own[0]["capacity_rps_per_gpu"])
        times = [float(row["capacity_rps_per_gpu"]) / alone if alone > 0.0 else None for row in own]
        shown = (name[0], name[1] if several else "", name[2])
        series.append(Series(" ".join(filter(None, shown)), counts, times, group=name[0]))
    title = "Capacity per GPU over that of the fewest replicas"
    return Chart("scaling", title, "replicas", "times", series, marks=(("1", 1.0),))
