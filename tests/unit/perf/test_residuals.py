"""Errors by region and residual quantiles, checked by hand."""

from __future__ import annotations

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.fit import Sample
from slos_serve.perf.residuals import error_by_region, error_followed, ratio_quantiles

# One second a token, nothing else.
UNIT = BatchTimeModel(1.0, 0.0, 0.0, 0.0)


def sample(tokens: int, ratio: float, prefill: int = 0) -> Sample:
    return Sample(BatchShape(tokens), tokens * ratio, prefill_tokens=prefill)


def test_quantiles_are_of_measured_over_predicted() -> None:
    samples = [sample(4, 1.0 + i / 100.0) for i in range(101)]
    assert ratio_quantiles(UNIT, samples, (0.5, 0.9)) == pytest.approx({0.5: 1.5, 0.9: 1.9})


def test_a_model_that_predicts_half_the_time_has_ratio_two() -> None:
    assert ratio_quantiles(UNIT, [sample(4, 2.0)] * 5)[0.5] == pytest.approx(2.0)


def test_regions_by_hand() -> None:
    samples = [sample(1, 1.0), sample(2, 0.5), sample(8, 2.0, prefill=8), sample(10, 1.0, prefill=6)]
    errors = error_by_region(UNIT, samples)
    assert {name: error.samples for name, error in errors.items()} == {
        "all": 4, "decode only": 2, "prefill only": 1, "mixed": 1, "small half": 2, "large half": 2,
    }  # fmt: skip
    assert errors["decode only"].median == pytest.approx(0.5)
    assert errors["decode only"].bias == pytest.approx(0.5)
    assert errors["prefill only"].median == pytest.approx(0.5)
    assert errors["prefill only"].bias == pytest.approx(-0.5)
    assert errors["prefill only"].r2 is None
    assert errors["mixed"].p90 == 0.0


def test_r2_of_exact_predictions_is_one_and_of_the_mean_is_zero() -> None:
    exact = [sample(n, 1.0) for n in (1, 2, 3)]
    assert error_by_region(UNIT, exact)["all"].r2 == pytest.approx(1.0)
    constant = [Sample(BatchShape(2), duration_s) for duration_s in (1.0, 2.0, 3.0)]
    assert error_by_region(UNIT, constant)["all"].r2 == pytest.approx(0.0)


def test_empty_regions_are_left_out() -> None:
    assert set(error_by_region(UNIT, [sample(1, 1.0), sample(2, 1.0)])) == {
        "all", "decode only", "small half", "large half",
    }  # fmt: skip


def test_no_samples_are_refused() -> None:
    with pytest.raises(InvalidFieldError, match="at least one"):
        ratio_quantiles(UNIT, [])
    with pytest.raises(InvalidFieldError, match="at least one"):
        error_by_region(UNIT, [])


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.1, float("nan")])
def test_quantiles_outside_the_open_unit_interval_are_refused(quantile: float) -> None:
    with pytest.raises(InvalidFieldError, match="quantile"):
        ratio_quantiles(UNIT, [sample(1, 1.0)], (quantile,))


def test_drift_that_the_correction_follows_is_no_error_of_what_is_planned_with() -> None:
    drifting = [sample(10 + i % 7, 1.0 if i < 40 else 1.3) for i in range(400)]
    bare = error_by_region(UNIT, drifting)["all"]
    followed = error_followed(UNIT, drifting, held_out_every=4)
    assert bare.median == pytest.approx(1.0 - 1.0 / 1.3)
    assert followed.samples == 100
    assert followed.median < 0.02
