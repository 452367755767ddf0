"""Fits the batch-time model to measured batches and says how far off it is.

Relative error is what counts: a planner that is 5 ms off on a 40 ms decode step breaks promises, on a 4 s prefill it
does not matter. Every coefficient is kept at 0 or above, so that more work never looks cheaper. The two branches make
the problem piecewise linear: samples are assigned to the branch that is larger under the current coefficients, a
non-negative least-squares fit follows, and this repeats; it starts from several splits and keeps the best. Outliers (a
stalled machine) lose their weight by Huber's rule with a scale taken from the median residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.formula import B_C, B_M, K_C, K_CTX, K_M, K_Q, K_S, K_SEQ, NUM_COEFFICIENTS, features_s

MIN_SAMPLES = 20
HELD_OUT_EVERY = 4
# Residuals within this many robust standard deviations keep their full weight (95 % efficient on normal noise).
HUBER_WIDTH = 1.345
SPLIT_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MAX_ROUNDS = 30
SCALE_FLOOR = 1e-3

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured batch.

    Attributes:
        shape: what was in it.
        duration_s: how long it took, in seconds, above 0.
        prefill_tokens: the part of ``shape.new_tokens`` that was prefill; names the region it belongs to.
    """

    shape: BatchShape
    duration_s: float
    prefill_tokens: int = 0

    def __post_init__(self) -> None:
        if not np.isfinite(self.duration_s) or self.duration_s <= 0.0:
            raise InvalidFieldError("duration_s", self.duration_s, "a finite number of seconds above 0")
        if self.shape.new_tokens < 1:
            raise InvalidFieldError("new_tokens", self.shape.new_tokens, "a whole number, 1 or more")


@dataclass(frozen=True, slots=True)
class FitResult:
    """A fitted model and the samples that it was not fitted on.

    Attributes:
        model: the coefficients.
        held_out: every :data:`HELD_OUT_EVERY`-th sample, for judging the fit.
        num_fitted: samples the coefficients come from.
    """

    model: BatchTimeModel
    held_out: tuple[Sample, ...]
    num_fitted: int


def fit_held_out(samples: Sequence[Sample]) -> FitResult:
    """Fit three quarters of the samples and keep the rest for judging; the split is by position.

    Raises:
        InvalidFieldError: too few samples, or they do not tell the slope.
    """
    held_out = tuple(samples[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    fitted = [sample for i, sample in enumerate(samples) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return FitResult(fit(fitted), held_out, len(fitted))


def fit(samples: Sequence[Sample]) -> BatchTimeModel:
    """Coefficients, all >= 0, that give the least (robust) relative error.

    Raises:
        InvalidFieldError: fewer than :data:`MIN_SAMPLES` samples, or all of about one size, or times that do not grow
            with the number of tokens.
    """
    if len(samples) < MIN_SAMPLES:
        raise InvalidFieldError("samples", len(samples), f"at least {MIN_SAMPLES} measured batches")
    features, duration_s = _as_arrays(samples)
    tokens = features[:, 0]
    if len(np.unique(tokens)) < 3 or tokens.max() < 2.0 * tokens.min():
        raise InvalidFieldError(
            "samples",
            f"{len(samples)} batches of {tokens.min():.0f} to {tokens.max():.0f} tokens",
            "batches of at least 3 sizes, the largest at least twice the smallest",
        )
    candidates = [_fit_from(features, duration_s, compute) for compute in _starts(tokens)]
    losses = [_loss(features_s(candidate, *features.T), duration_s) for candidate in candidates]
    best = candidates[int(np.argmin(losses))]
    if max(best[K_C], best[K_M]) <= 0.0:
        raise InvalidFieldError("samples", f"{len(samples)} batches", "times that grow with the number of tokens")
    return BatchTimeModel(*best.tolist())


def predict_s(model: BatchTimeModel, samples: Sequence[Sample]) -> FloatArray:
    """float64 [len(samples)], predicted seconds of each."""
    features, _ = _as_arrays(samples)
    return np.asarray(features_s(model.coefficients, *features.T))


def _as_arrays(samples: Sequence[Sample]) -> tuple[FloatArray, FloatArray]:
    """float64 [k, 5], see :attr:`BatchShape.features`, and float64 [k] of seconds."""
    features = np.array([sample.shape.features for sample in samples]).reshape(len(samples), 5)
    return features, np.array([sample.duration_s for sample in samples], dtype=np.float64)


def _starts(tokens: FloatArray) -> list[NDArray[np.bool_]]:
    """Which samples start on the compute-bound branch: all of them, or those above a size."""
    edges = sorted({float(edge) for edge in np.quantile(tokens, SPLIT_QUANTILES)})
    return [np.ones(len(tokens), dtype=np.bool_), *(tokens > edge for edge in edges)]


def _fit_from(features: FloatArray, duration_s: FloatArray, compute: NDArray[np.bool_]) -> FloatArray:
    """Alternate branch assignment and weighted fit from one start; the best coefficients met."""
    weight = np.ones(len(duration_s))
    best = np.zeros(NUM_COEFFICIENTS)
    best_loss = np.inf
    for _ in range(MAX_ROUNDS):
        coefficients = _solve(features, duration_s, compute, weight)
        predicted_s = features_s(coefficients, *features.T)
        loss = _loss(predicted_s, duration_s)
        if loss < best_loss:
            best, best_loss = coefficients, loss
        reassigned = _on_compute_branch(features, coefficients)
        new_weight = _huber_weight(predicted_s / duration_s - 1.0)
        if np.array_equal(reassigned, compute) and np.allclose(new_weight, weight, atol=1e-3):
            break
        compute, weight = reassigned, new_weight
    return best


def _solve(features: FloatArray, duration_s: FloatArray, compute: NDArray[np.bool_], weight: FloatArray) -> FloatArray:
    """Non-negative least squares of the relative error, branches fixed."""
    design = np.zeros((len(duration_s), NUM_COEFFICIENTS))
    on, off = compute.astype(np.float64), (~compute).astype(np.float64)
    design[:, K_C], design[:, B_C] = features[:, 0] * on, on
    design[:, K_M], design[:, B_M] = features[:, 0] * off, off
    design[:, [K_CTX, K_Q, K_SEQ, K_S]] = features[:, 1:]
    design *= (np.sqrt(weight) / duration_s)[:, None]
    # Columns differ by ten orders of magnitude; unit length keeps the solver's tolerance meaningful.
    length = np.linalg.norm(design, axis=0)
    length[length == 0.0] = 1.0
    solution, _ = nnls(design / length, np.sqrt(weight))
    return np.asarray(solution / length, dtype=np.float64)


def _on_compute_branch(features: FloatArray, coefficients: FloatArray) -> NDArray[np.bool_]:
    tokens = features[:, 0]
    compute = coefficients[K_C] * tokens + coefficients[B_C]
    return np.asarray(compute >= coefficients[K_M] * tokens + coefficients[B_M], dtype=np.bool_)


def _huber_weight(error: FloatArray) -> FloatArray:
    limit = HUBER_WIDTH * max(1.4826 * float(np.median(np.abs(error))), SCALE_FLOOR)
    size = np.abs(error)
    return np.where(size <= limit, 1.0, limit / np.maximum(size, limit))


def _loss(predicted_s: FloatArray, duration_s: FloatArray) -> float:
    """Mean absolute relative error, each capped at 1 so that a stall cannot choose between two fits."""
    return float(np.minimum(np.abs(predicted_s / duration_s - 1.0), 1.0).mean())
