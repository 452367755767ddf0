"""The demo's chart: attainment by class and phase, and tokens over time of a few streams, stock beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slos_serve.bench.demo_plan import DemoPlan
from slos_serve.bench.demo_report import OURS, PHASES, SIDE_TITLES, STOCK, SideRun
from slos_serve.bench.requests import Response
from slos_serve.metrics.attainment import StageTarget, targets_of
from slos_serve.metrics.summary import TOTAL, wilson_interval
from slos_serve.perf.batch_time import BatchTimeModel

COLORS: Mapping[str, str] = {STOCK: "#9a9a9a", OURS: "#1f6fb4"}
_DUE = "#c8442b"
STYLE: Any = {  # names of settings are literals to its type, which a dict of ours cannot be
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 150,
}


def plot_demo(
    result: Mapping[str, Any], sides: Mapping[str, SideRun], plan: DemoPlan, model: BatchTimeModel, path: Path
) -> None:
    """Draw the demo's chart.

    Args:
        result: its JSON.
        sides: both sides' runs.
        plan: what was sent.
        model: for slowdown SLOs.
        path: PNG to write.
    """
    with mpl.rc_context():
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(10.0, 6.8), layout="constrained")
        grid = figure.add_gridspec(2, 6, height_ratios=(1.0, 1.05))
        for column, phase in enumerate(PHASES):
            _attainment(figure.add_subplot(grid[0, 3 * column : 3 * column + 3]), result, phase, legend=column == 0)
        names = [slo_class.name for slo_class in plan.classes]
        for column, name in enumerate(names[:3]):
            axes = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
            _streams(axes, sides, name, plan, model, first=column == 0)
        figure.suptitle(_title(result) + "\n", x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(_caption(result), x=0.01, ha="left", fontsize=7.5, color="#606060")
        figure.savefig(path)


def _title(result: Mapping[str, Any]) -> str:
    stock, ours = (result[side]["burst"]["attained"] for side in (STOCK, OURS))
    requests = result[OURS]["burst"]["requests"]
    return f"In the burst {ours} of {requests} requests keep their latency promises; on stock vLLM {stock}"


def _caption(result: Mapping[str, Any]) -> str:
    setup = result["setup"]
    engine = "{model} on {device}, vLLM {engine_version}, seed {seed}.\n".format_map(setup) if "model" in setup else ""
    return (
        f"{engine}Bars: Wilson 95 % intervals. Streams: of each class the first request of "
        "the burst's second half that kept its promise with slos-serve, or the first if none did."
    )


def _attainment(axes: Axes, result: Mapping[str, Any], phase: str, legend: bool) -> None:
    """Bars a class, stock beside ours, with Wilson 95 % intervals and counts."""
    names = [*result[STOCK][phase]["classes"], TOTAL]
    at = np.arange(len(names), dtype=np.float64)
    for side, shift in ((STOCK, -0.2), (OURS, 0.2)):
        counts = [_counts(result[side][phase], name) for name in names]
        rates = [100.0 * attained / max(requests, 1) for attained, requests in counts]
        bounds = [wilson_interval(attained, requests) for attained, requests in counts]
        low = [max(0.0, rate - 100.0 * bound[0]) for rate, bound in zip(rates, bounds, strict=True)]
        high = [max(0.0, 100.0 * bound[1] - rate) for rate, bound in zip(rates, bounds, strict=True)]
        axes.bar(at + shift, rates, 0.38, color=COLORS[side], label=SIDE_TITLES[side])
        axes.errorbar(at + shift, rates, [low, high], fmt="none", ecolor="#505050", elinewidth=0.7, capsize=2)
        for x, rate, up, (attained, requests) in zip(at + shift, rates, high, counts, strict=True):
            text, top = f"{attained}/{requests}", (x, rate + up)
            axes.annotate(text, top, (0, 2), textcoords="offset points", ha="center", fontsize=7, color="#303030")
    load = result["setup"].get(f"{phase}_load")
    offered = "" if load is None else f": {load:.0%} of capacity offered"
    axes.set_title(f"{phase.capitalize()} phase{offered}")
    axes.set_xticks(at, [*names[:-1], "all"])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 25))
    if legend:
        axes.set_ylabel("requests that attain, %")


def _counts(phase: Mapping[str, Any], name: str) -> tuple[int, int]:
    if name == TOTAL:
        return phase["attained"], phase["requests"]
    return phase["attained_by_class"].get(name, 0), phase["requests_by_class"].get(name, 0)


def _streams(
    axes: Axes, sides: Mapping[str, SideRun], name: str, plan: DemoPlan, model: BatchTimeModel, first: bool
) -> None:
    """Tokens over time of one request of the burst on both sides, with the line that its promise draws."""
    request_id = stream_shown(sides, name)
    if request_id is None:
        axes.set_axis_off()
        return
    for side in (STOCK, OURS):
        response = _response(sides[side], request_id)
        times = response.token_times_s - response.sent_s
        axes.step(
            np.concatenate([[0.0], times]), np.arange(len(times) + 1), where="post", color=COLORS[side],
            lw=1.8, label=SIDE_TITLES[side],
        )  # fmt: skip
    response = _response(sides[OURS], request_id)
    (target,) = targets_of(plan.classes.classes[name], model.zero_load_s(response.prompt_tokens))
    due_s, tokens = due_line(target, response.output_tokens)
    axes.plot(due_s, tokens, color=_DUE, lw=1.2, ls="--", label="promised at the latest")
    axes.set_title(f"Burst, one stream: {name}")
    axes.set_xlabel("seconds since the request was sent")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if first:
        axes.set_ylabel("tokens received")
        axes.figure.legend(
            *axes.get_legend_handles_labels(), frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.968), ncols=3
        )


def due_line(target: StageTarget, tokens: int) -> tuple[list[float], list[int]]:
    """Latest times at which a stream may deliver its tokens: from the TTFT on one token a TPOT."""
    times = [target.ttft_s + k * target.tpot_s for k in range(tokens)]
    return times, list(range(1, tokens + 1))


def stream_shown(sides: Mapping[str, SideRun], name: str) -> str | None:
    """Which request of a class stands for the burst: the first that arrives in its second half and attains on ours.

    Without one that attains, the first of the second half.
    """
    ours = sides[OURS]
    responses = ours.loads["burst"].responses
    if not responses:
        return None
    half_s = responses[-1].request.arrival_s / 2.0
    late = [
        (response, scored)
        for response, scored in zip(responses, ours.scored["burst"], strict=True)
        if scored.slo_class == name and response.request.arrival_s >= half_s and response.chunk_times_s
    ]
    found: Sequence[tuple[Response, Any]] = [pair for pair in late if pair[1].attained] or late
    return found[0][0].request.request_id if found else None


def _response(side: SideRun, request_id: str) -> Response:
    return next(r for r in side.loads["burst"].responses if r.request.request_id == request_id)
