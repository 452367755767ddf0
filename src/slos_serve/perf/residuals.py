"""How wrong a batch-time model is: by region of the batches, and as quantiles to plan with.

The ratio measured / predicted is what the planner multiplies a prediction by to be late no more often than it chose to
be; the relative error by region is what a person reads to decide whether to trust the model at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.fit import Sample, predict_s
from slos_serve.perf.online import OnlineCorrection

QUANTILES = (0.5, 0.9, 0.99)
FOLLOWED = "all, drift followed"
REGIONS = ("all", "decode only", "prefill only", "mixed", "small half", "large half")


@dataclass(frozen=True, slots=True)
class RegionError:
    """Error of a model on the measured batches of one region.

    Attributes:
        samples: batches in the region.
        median, p90: quantiles of |predicted - measured| / measured.
        bias: median of (predicted - measured) / measured; above 0 when it predicts too long.
        r2: share of the variance of the measured seconds that is explained; ``None`` with fewer than three batches or
            no variance.
    """

    samples: int
    median: float
    p90: float
    bias: float
    r2: float | None


def ratio_quantiles(
    model: BatchTimeModel, samples: Sequence[Sample], quantiles: Sequence[float] = QUANTILES
) -> dict[float, float]:
    """Quantiles of measured / predicted.

    Raises:
        InvalidFieldError: no samples, or a quantile outside (0, 1).
    """
    if not samples:
        raise InvalidFieldError("samples", 0, "at least one measured batch")
    for quantile in quantiles:
        if not 0.0 < quantile < 1.0:
            raise InvalidFieldError("residual quantile", quantile, "a number in (0, 1)")
    ratio = _measured_s(samples) / predict_s(model, samples)
    return {quantile: float(np.quantile(ratio, quantile)) for quantile in quantiles}


def error_by_region(model: BatchTimeModel, samples: Sequence[Sample]) -> dict[str, RegionError]:
    """Errors of every region in :data:`REGIONS` that has samples; halves are split at the median token count."""
    if not samples:
        raise InvalidFieldError("samples", 0, "at least one measured batch")
    predicted_s, measured_s = predict_s(model, samples), _measured_s(samples)
    masks = _masks(samples)
    return {name: _error(predicted_s[mask], measured_s[mask]) for name, mask in masks.items() if mask.any()}


def error_followed(model: BatchTimeModel, samples: Sequence[Sample], held_out_every: int) -> RegionError:
    """Error of what the planner plans with: the model times the online correction, which follows the machine's drift.

    The correction learns from every sample in order and predicts each before it sees it.

    Args:
        model: fitted without the held-out samples.
        samples: all of them, in the order in which they were measured.
        held_out_every: the error is of every so many-th sample.
    """
    predicted_s, measured_s = predict_s(model, samples), _measured_s(samples)
    correction = OnlineCorrection()
    followed_s = np.empty_like(predicted_s)
    for index, sample in enumerate(samples):
        followed_s[index] = predicted_s[index] * correction.factor
        correction.observe(sample.shape, float(predicted_s[index]), sample.duration_s)
    held_out = slice(held_out_every - 1, None, held_out_every)
    return _error(followed_s[held_out], measured_s[held_out])


def _masks(samples: Sequence[Sample]) -> dict[str, NDArray[np.bool_]]:
    tokens = np.array([sample.shape.new_tokens for sample in samples])
    prefill = np.array([sample.prefill_tokens for sample in samples])
    small = tokens <= np.median(tokens)
    masks = (
        np.ones(len(samples), dtype=np.bool_),
        prefill == 0,
        prefill == tokens,
        (prefill > 0) & (prefill < tokens),
        small,
        ~small,
    )
    return dict(zip(REGIONS, masks, strict=True))


def _error(predicted_s: NDArray[np.float64], measured_s: NDArray[np.float64]) -> RegionError:
    signed = predicted_s / measured_s - 1.0
    size = np.abs(signed)
    total = float(((measured_s - measured_s.mean()) ** 2).sum())
    known = len(measured_s) >= 3 and total > 0.0
    return RegionError(
        samples=len(measured_s),
        median=float(np.median(size)),
        p90=float(np.quantile(size, 0.9)),
        bias=float(np.median(signed)),
        r2=1.0 - float(((measured_s - predicted_s) ** 2).sum()) / total if known else None,
    )


def _measured_s(samples: Sequence[Sample]) -> NDArray[np.float64]:
    return np.array([sample.duration_s for sample in samples], dtype=np.float64)
