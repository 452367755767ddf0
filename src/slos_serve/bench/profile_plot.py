"""Draws predicted against measured batch times, and the ratio by batch size: where the model holds and where not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.fit import Sample, predict_s

# One colour and marker a region, told apart without colour too.
_REGIONS = (("decode only", "#0072B2", "o"), ("mixed", "#E69F00", "^"), ("prefill only", "#009E73", "s"))
_BAND = 0.15


def plot_profile(model: BatchTimeModel, samples: Sequence[Sample], title: str, path: Path) -> None:
    """Write a PNG (or whatever the suffix names) of a model against the batches it should predict."""
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    against, ratio = figure.subplots(1, 2)
    predicted_ms = 1e3 * predict_s(model, samples)
    measured_ms = 1e3 * np.array([sample.duration_s for sample in samples])
    tokens = np.array([sample.shape.new_tokens for sample in samples])
    prefill = np.array([sample.prefill_tokens for sample in samples])
    masks = (prefill == 0, (prefill > 0) & (prefill < tokens), prefill == tokens)
    for (name, color, marker), mask in zip(_REGIONS, masks, strict=True):
        if mask.any():
            style = {"color": color, "marker": marker, "alpha": 0.6, "linewidths": 0.0, "s": 18}
            against.scatter(measured_ms[mask], predicted_ms[mask], label=f"{name} ({mask.sum()})", **style)
            ratio.scatter(tokens[mask], measured_ms[mask] / predicted_ms[mask], **style)
    _finish_against(against, float(measured_ms.min()), float(measured_ms.max()))
    _finish_ratio(ratio)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _finish_against(axes: Axes, low_ms: float, high_ms: float) -> None:
    line_ms = np.array([0.8 * low_ms, 1.25 * high_ms])
    axes.plot(line_ms, line_ms, color="black", linewidth=1.0)
    axes.fill_between(line_ms, line_ms * (1.0 - _BAND), line_ms * (1.0 + _BAND), color="black", alpha=0.08)
    axes.set(xscale="log", yscale="log", xlabel="measured batch time (ms)", ylabel="predicted (ms)")
    axes.set_title(f"predicted against measured (band: ±{_BAND:.0%})", fontsize=10)
    axes.legend(loc="upper left", frameon=False)


def _finish_ratio(axes: Axes) -> None:
    axes.axhline(1.0, color="black", linewidth=1.0)
    axes.axhspan(1.0 - _BAND, 1.0 + _BAND, color="black", alpha=0.08, linewidth=0.0)
    axes.set(xscale="log", xlabel="new tokens in the batch", ylabel="measured / predicted")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, min(low, 0.7)), min(max(high, 1.3), 3.0))
    axes.set_title("ratio by batch size (cut off at 3)", fontsize=10)
