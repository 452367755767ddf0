"""The chart of ``slos-serve size``: servers through the day, and what each way to size costs and breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slos_serve.bench.plots import STYLE

_COLORS = ("#1f6fb4", "#6baed6", "#9a9a9a", "#c4c4c4", "#3a8f5c", "#c8442b", "#e0a03c", "#7a5aa6")


def plot_size(result: Mapping[str, Any], path: Path) -> None:
    """Draw the chart.

    Args:
        result: what the command writes as JSON.
        path: PNG or SVG to write.
    """
    sizes: Sequence[Mapping[str, Any]] = result["sizes"]
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(sizes))]
    with mpl.rc_context():
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(10.0, 4.2), layout="constrained")
        day, cost = figure.subplots(1, 2, width_ratios=(1.3, 1.0))
        _day(day, result, colors)
        _cost(cost, sizes, colors)
        figure.savefig(path)


def _day(axes: Axes, result: Mapping[str, Any], colors: Sequence[str]) -> None:
    rates = result["day"]["rate_rps"]
    edges = np.linspace(0.0, result["day"]["hours"], len(rates) + 1)
    # Equal numbers lie on each other: the later ones are thinner, so that every one is seen.
    widths = np.linspace(3.2, 0.8, len(result["sizes"]))
    for size, color, width in zip(result["sizes"], colors, widths, strict=True):
        axes.stairs(size["servers_through_day"], edges, color=color, linewidth=width, label=size["by"])
    axes.set_ylim(0, None)
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel("hour")
    axes.set_ylabel("servers (grey: requests/s)")
    axes.set_title(f"Servers that follow {result['traffic']}, at most {result['peak_rps']:g} requests/s")
    load = axes.twinx()
    load.stairs(rates, edges, color="#dddddd", fill=True, zorder=0)
    load.set_ylim(0, 2.2 * max(rates))
    load.set_yticks([])
    axes.set_zorder(load.get_zorder() + 1)
    axes.patch.set_visible(False)


def _cost(axes: Axes, sizes: Sequence[Mapping[str, Any]], colors: Sequence[str]) -> None:
    places = np.arange(len(sizes))[::-1]
    hours = [size["server_hours"] for size in sizes]
    axes.barh(places, hours, color=colors)
    for place, size in zip(places, sizes, strict=True):
        text = f" {size['server_hours']:.0f} h, worst class {100 * size['worst_class_violations']:.1f} %"
        axes.text(size["server_hours"], place, text, va="center", fontsize=7.5)
    axes.set_yticks(places, [size["by"] for size in sizes])
    axes.set_xlim(0, 1.75 * max(hours))
    axes.set_xlabel("server-hours a day; violations at the busiest time")
    axes.set_title("Cost, and what it breaks")
