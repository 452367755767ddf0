"""A run over time: arrivals, latency, attainment and batches in equal slices of virtual time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slos_serve.metrics.bulk import CallScores
from slos_serve.sim.outcome import score
from slos_serve.sim.recording import Recording

Floats = NDArray[np.float64]


def timeline(recording: Recording, slices: int = 120) -> dict[str, Any]:
    """Series over ``slices`` slices; a value is ``None`` where a slice holds nothing.

    Keys: ``t_s`` (middle of the slice), ``arrivals_rps``, ``ttft_p99_ms``, ``tpot_p99_ms`` and ``attained`` (by arrival
    of the call), ``batch_tokens``, ``batch_seqs`` and ``step_ms`` (means over steps), ``running``, ``waiting`` and
    ``used_blocks`` (means over steps, of all replicas); ``promised_rps``, and ``ttft_of_target_p99`` and
    ``tpot_of_target_p99`` (latency over its target) of the calls that were promised something: those admitted, or all
    that came where a policy admits nobody. A rejected call was promised nothing.
    """
    calls = recording.calls
    came = np.isfinite(calls["arrival_s"])
    if not came.any():
        return {"t_s": []}
    last_s = float(calls["arrival_s"][came].max()) + 1e-9
    edges = np.linspace(0.0, last_s, slices + 1)
    width_s = last_s / slices
    scores = score(recording)
    where = np.clip(np.searchsorted(edges, calls["arrival_s"], side="right") - 1, 0, slices - 1)
    done = scores.completed
    steps = recording.steps.rows
    at = np.searchsorted(edges, steps["start_s"], side="right") - 1
    shown = (at >= 0) & (at < slices)
    series: dict[str, Any] = {
        "t_s": _listed(0.5 * (edges[:-1] + edges[1:])),
        "arrivals_rps": _listed(np.bincount(where[came], minlength=slices) / width_s),
        "ttft_p99_ms": _quantiles(1000.0 * scores.ttft_s[done], where[done], slices),
        "tpot_p99_ms": _quantiles(1000.0 * scores.tpot_s[done], where[done], slices),
        "attained": _means(scores.attained[came].astype(np.float64), where[came], slices),
    }
    series |= _promised(recording, scores, where, width_s, slices)
    columns = {"batch_tokens": "new_tokens", "batch_seqs": "num_seqs", "running": "running", "waiting": "waiting"}
    for name, column in {**columns, "used_blocks": "used_blocks"}.items():
        series[name] = _means(steps[column][shown].astype(np.float64), at[shown], slices)
    series["step_ms"] = _means(1000.0 * steps["duration_s"][shown].astype(np.float64), at[shown], slices)
    return series


def _promised(
    recording: Recording, scores: CallScores, where: NDArray[np.int64], width_s: float, slices: int
) -> dict[str, Any]:
    """Latency over target of what was promised."""
    admitted = recording.calls["admitted"] == 1
    promised = admitted if admitted.any() else np.isfinite(recording.calls["arrival_s"]) & ~recording.rejected
    targets = recording.workload.calls
    done = scores.completed & promised
    return {
        "promised_rps": _listed(np.bincount(where[promised], minlength=slices) / width_s),
        "ttft_of_target_p99": _quantiles((scores.ttft_s / targets["ttft_s"])[done], where[done], slices),
        "tpot_of_target_p99": _quantiles((scores.tpot_s / targets["tpot_s"])[done], where[done], slices),
    }


def _listed(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def _means(values: Floats, where: NDArray[np.int64], slices: int) -> list[float | None]:
    totals = np.bincount(where, weights=values, minlength=slices)
    counts = np.bincount(where, minlength=slices)
    return _listed(np.where(counts > 0, totals / np.maximum(counts, 1), np.nan))


def _quantiles(values: Floats, where: NDArray[np.int64], slices: int) -> list[float | None]:
    found = np.full(slices, np.nan)
    for index in range(slices):
        own = values[where == index]
        own = own[~np.isnan(own)]
        if len(own):
            found[index] = np.quantile(own, 0.99)
    return _listed(found)
