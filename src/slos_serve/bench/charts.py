"""Charts of results: described once, drawn twice (Plotly for the page, Matplotlib for PNG files)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import matplotlib as mpl
import plotly.graph_objects as go
from matplotlib.figure import Figure

# Okabe-Ito: told apart by people who do not see every colour.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
Dash = Literal["-", "--", ":", "-."]
# What this project adds is drawn alike everywhere.
OURS, OUR_COLOUR = "slos-serve", "#D55E00"
# Matplotlib's and Plotly's names.
DASHES: tuple[tuple[Dash, str], ...] = (("-", "solid"), ("--", "dash"), (":", "dot"), ("-.", "dashdot"))
Number = float | None


@dataclass(frozen=True)
class Series:
    """One line, or one group of bars.

    Attributes:
        name: in the legend.
        x: numbers for lines, names for bars.
        y: values; ``None`` leaves a gap.
        low, high: ends of error bars, empty for none.
        group: lines of one group have one colour and are told apart by their dashes; none for a colour of its own.
    """

    name: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[Number]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    group: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart in words.

    Attributes:
        key: file name without ending.
        title, x_label, y_label: texts.
        series: what is drawn.
        kind: lines over numbers or bars over names.
        marks: (name, value) of horizontal dashed lines.
        log_y: logarithmic scale.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: Literal["lines", "bars"] = "lines"
    marks: Sequence[tuple[str, float]] = field(default_factory=tuple)
    log_y: bool = False


def _colours(series: Sequence[Series]) -> list[str]:
    """One a series, or a group of them: ours where exactly one is of this project, the others in turn."""
    groups = list(dict.fromkeys(one.group for one in series))
    if groups != [""]:
        every = (OUR_COLOUR, *COLOURS)
        return [every[groups.index(one.group) % len(every)] for one in series]
    ours = [one.name.partition(",")[0].partition(":")[0] == OURS for one in series]
    if sum(ours) != 1:
        every = (OUR_COLOUR, *COLOURS)
        return [every[index % len(every)] for index in range(len(series))]
    others = itertools.cycle(COLOURS)
    return [OUR_COLOUR if mine else next(others) for mine in ours]


def _dashes(series: Sequence[Series]) -> list[tuple[Dash, str]]:
    """Solid lines, and others for the second and later ones of a group."""
    found, seen = [], dict.fromkeys((one.group for one in series), 0)
    for one in series:
        found.append(DASHES[seen[one.group] % len(DASHES)])
        seen[one.group] += 1 if one.group else 0
    return found


def plotly_figure(chart: Chart) -> go.Figure:
    """The chart for a web page."""
    figure = go.Figure()
    styles = zip(chart.series, _colours(chart.series), _dashes(chart.series), strict=True)
    for series, colour, (_, dash) in styles:
        bars = None
        if series.low:
            above = [high - (y or 0.0) for high, y in zip(series.high, series.y, strict=True)]
            below = [(y or 0.0) - low for low, y in zip(series.low, series.y, strict=True)]
            bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        if chart.kind == "bars":
            figure.add_bar(x=list(series.x), y=list(series.y), name=series.name, marker_color=colour, error_y=bars)
        else:
            figure.add_scatter(
                x=list(series.x),
                y=list(series.y),
                name=series.name,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                error_y=bars,
            )
    for name, value in chart.marks:
        figure.add_hline(y=value, line_dash="dash", line_color="#666666", annotation_text=name)
    figure.update_layout(
        title=chart.title,
        xaxis_title=chart.x_label,
        yaxis_title=chart.y_label,
        yaxis_type="log" if chart.log_y else "linear",
        template="plotly_white",
        barmode="group",
        height=480,
    )
    return figure


def png_bytes(chart: Chart) -> bytes:
    """The chart as a PNG file."""
    with mpl.rc_context({"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.0, 4.2), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(str(x) for series in chart.series for x in series.x)) if chart.kind == "bars" else []
        width = 0.8 / max(len(chart.series), 1)
        styles = zip(chart.series, _colours(chart.series), _dashes(chart.series), strict=True)
        for index, (series, colour, (dash, _)) in enumerate(styles):
            values = [float("nan") if y is None else y for y in series.y]
            errors = None
            if series.low:
                errors = [
                    [max(y - low, 0.0) for y, low in zip(values, series.low, strict=True)],
                    [max(high - y, 0.0) for y, high in zip(values, series.high, strict=True)],
                ]
            if chart.kind == "bars":
                places = [names.index(str(x)) + (index - 0.5 * (len(chart.series) - 1)) * width for x in series.x]
                axes.bar(places, values, width, yerr=errors, label=series.name, color=colour, capsize=2)
            else:
                points = [float(x) for x in series.x]
                drawn = axes.errorbar(points, values, errors, label=series.name, color=colour, marker=".", markersize=4)
                drawn.lines[0].set_linestyle(dash)
        for name, value in chart.marks:
            axes.axhline(value, linestyle="--", color="#666666", linewidth=1.0)
            axes.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
        if names:
            axes.set_xticks(range(len(names)), names)
        if chart.log_y:
            axes.set_yscale("log")
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.set_title(chart.title, loc="left", fontweight="bold")
        if len(chart.series) > 1:
            # Beside the data: there is no corner that no line may cross.
            figure.legend(loc="outside right upper", frameon=False)
        buffer = io.BytesIO()
        # No date inside: the same result gives the same file.
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
