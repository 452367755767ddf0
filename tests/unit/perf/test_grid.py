"""The profiling grid stays in bounds and covers decodes, prefill and mixtures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.grid import GridPoint, grid_pass, grid_points


@given(max_decodes=st.integers(1, 512), max_tokens=st.integers(1, 16_384), seed=st.integers(0, 1000))
def test_points_fit_the_engine_and_are_never_empty(max_decodes: int, max_tokens: int, seed: int) -> None:
    for point in grid_pass(max_decodes, max_tokens, np.random.default_rng(seed)):
        assert 0 <= point.decodes <= max_decodes
        assert point.prefill_tokens >= 0
        assert 1 <= point.decodes + point.prefill_tokens <= max_tokens


def test_a_pass_covers_every_region() -> None:
    points = grid_pass(32, 2048, np.random.default_rng(0))
    assert GridPoint(1, 0) in points
    assert GridPoint(32, 0) in points
    assert any(point.decodes == 0 and point.prefill_tokens > 1024 for point in points)
    assert any(point.decodes > 0 and point.prefill_tokens > 1024 for point in points)
    assert any(point.decodes > 0 and 16 <= point.prefill_tokens <= 32 for point in points)


def test_passes_differ_in_order_and_sizes_but_repeat_with_the_seed() -> None:
    rng = np.random.default_rng(1)
    first, second = grid_pass(32, 2048, rng), grid_pass(32, 2048, rng)
    assert first != second
    assert first == grid_pass(32, 2048, np.random.default_rng(1))


def test_points_go_on_after_a_pass() -> None:
    length = len(grid_pass(8, 256, np.random.default_rng(2)))
    points = grid_points(8, 256, np.random.default_rng(2))
    assert len([next(points) for _ in range(length + 5)]) == length + 5


@pytest.mark.parametrize(("max_decodes", "max_tokens"), [(0, 64), (8, 0)])
def test_empty_bounds_are_refused(max_decodes: int, max_tokens: int) -> None:
    with pytest.raises(InvalidFieldError):
        grid_pass(max_decodes, max_tokens, np.random.default_rng(0))
