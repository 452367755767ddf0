"""The fit recovers what made the samples, stands outliers, and refuses what cannot be fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.fit import HELD_OUT_EVERY, MIN_SAMPLES, Sample, fit, fit_held_out, predict_s
from slos_serve.perf.grid import grid_pass

GPU_LIKE = BatchTimeModel(
    k_c_s=1.1e-4, b_c_s=8e-3, k_m_s=3.85e-5, b_m_s=19.9e-3, k_ctx_s=6.3e-7, k_q_s=7.1e-9, k_seq_s=2e-5
)
CPU_LIKE = BatchTimeModel(k_c_s=1.9e-3, b_c_s=30e-3, k_m_s=0.0, b_m_s=0.0, k_ctx_s=3e-6, k_q_s=4e-8, k_seq_s=4e-3)


def shapes_of_a_profile(rng: np.random.Generator, passes: int = 6) -> list[BatchShape]:
    """Shapes that a profiling run with these bounds meets: grid points with random contexts."""
    shapes = []
    for _ in range(passes):
        for point in grid_pass(64, 2048, rng):
            done = int(rng.integers(0, 2048)) if point.prefill_tokens else 0
            context = int(point.decodes * rng.integers(16, 2000)) + done
            quad = point.prefill_tokens * (point.prefill_tokens + 2 * done)
            seqs = point.decodes + (point.prefill_tokens > 0)
            shapes.append(BatchShape(point.decodes + point.prefill_tokens, context, quad, seqs))
    return shapes


def samples_from(model: BatchTimeModel, noise: float, seed: int, passes: int = 6) -> list[Sample]:
    rng = np.random.default_rng(seed)
    shapes = shapes_of_a_profile(rng, passes)
    return [Sample(shape, model.step_s(shape) * float(np.exp(rng.normal(0.0, noise)))) for shape in shapes]


def relative_error(model: BatchTimeModel, truth: BatchTimeModel, samples: Sequence[Sample]) -> float:
    """90th percentile against the noise-free times."""
    true_s = predict_s(truth, samples)
    return float(np.quantile(np.abs(predict_s(model, samples) / true_s - 1.0), 0.9))


@pytest.mark.parametrize("truth", [GPU_LIKE, CPU_LIKE], ids=["gpu", "cpu"])
def test_noise_free_samples_give_the_model_back(truth: BatchTimeModel) -> None:
    samples = samples_from(truth, noise=0.0, seed=1)
    assert relative_error(fit(samples), truth, samples) < 0.005


@pytest.mark.parametrize("truth", [GPU_LIKE, CPU_LIKE], ids=["gpu", "cpu"])
def test_noisy_samples_give_predictions_within_a_few_percent(truth: BatchTimeModel) -> None:
    samples = samples_from(truth, noise=0.05, seed=2)
    assert relative_error(fit(samples), truth, samples) < 0.04


def test_stalls_hardly_move_the_fit() -> None:
    samples = samples_from(CPU_LIKE, noise=0.03, seed=3)
    stalled = [replace(s, duration_s=8.0 * s.duration_s) if i % 12 == 0 else s for i, s in enumerate(samples)]
    assert relative_error(fit(stalled), CPU_LIKE, samples) < 0.05


def test_both_branches_are_found() -> None:
    model = fit(samples_from(GPU_LIKE, noise=0.02, seed=4))
    slopes = sorted((model.k_c_s, model.k_m_s))
    assert slopes == pytest.approx([GPU_LIKE.k_m_s, GPU_LIKE.k_c_s], rel=0.3)


def test_held_out_samples_are_not_fitted() -> None:
    samples = samples_from(CPU_LIKE, noise=0.02, seed=5)
    wrecked = [
        replace(s, duration_s=1e3) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else s for i, s in enumerate(samples)
    ]
    result = fit_held_out(wrecked)
    assert all(sample.duration_s == 1e3 for sample in result.held_out)
    assert result.num_fitted + len(result.held_out) == len(samples)
    assert relative_error(result.model, CPU_LIKE, samples) < 0.04


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InvalidFieldError, match=f"at least {MIN_SAMPLES} measured batches"):
        fit(samples_from(CPU_LIKE, noise=0.0, seed=6)[: MIN_SAMPLES - 1])


def test_batches_of_one_size_are_refused() -> None:
    with pytest.raises(InvalidFieldError, match="at least 3 sizes"):
        fit([Sample(BatchShape(8, 100 * i), 0.05) for i in range(40)])


def test_times_that_shrink_with_tokens_are_refused() -> None:
    with pytest.raises(InvalidFieldError, match="grow with the number of tokens"):
        fit([Sample(BatchShape(n, num_seqs=1), 1.0 / n) for n in range(1, 60)])


@pytest.mark.parametrize("duration_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sample_without_a_real_duration_is_refused(duration_s: float) -> None:
    with pytest.raises(InvalidFieldError, match="duration_s"):
        Sample(BatchShape(1), duration_s)


def test_an_empty_batch_is_no_sample() -> None:
    with pytest.raises(InvalidFieldError, match="new_tokens"):
        Sample(BatchShape(0), 0.1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(0.0, 1.0))
def test_coefficients_are_never_negative_whatever_the_noise(seed: int, noise: float) -> None:
    try:
        model = fit(samples_from(GPU_LIKE, noise, seed, passes=1))
    except InvalidFieldError:
        return
    assert np.isfinite(model.coefficients).all()
    assert (model.coefficients >= 0.0).all()


def test_the_same_samples_give_the_same_fit() -> None:
    samples = samples_from(GPU_LIKE, noise=0.05, seed=7)
    assert fit(samples) == fit(samples)
