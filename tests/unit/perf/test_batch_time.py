"""The batch-time model: its formula, and that its inverses agree with it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.step_time import (
    UNBOUNDED_TOKENS,
    batch_s,
    decode_s,
    largest_chunk,
    request_s,
    roofline_s,
    roofline_tokens,
)

slopes = st.floats(1e-6, 1e-2)
constants = st.floats(0.0, 0.1)


@st.composite
def models(draw: st.DrawFn) -> BatchTimeModel:
    return BatchTimeModel(
        k_c_s=draw(slopes),
        b_c_s=draw(constants),
        k_m_s=draw(st.one_of(st.just(0.0), slopes)),
        b_m_s=draw(constants),
        k_ctx_s=draw(st.floats(0.0, 1e-5)),
        k_q_s=draw(st.one_of(st.just(0.0), st.floats(1e-12, 1e-7))),
        k_seq_s=draw(st.floats(0.0, 1e-2)),
        k_s_s=draw(st.floats(0.0, 1e-2)),
    )


def test_formula_by_hand() -> None:
    model = BatchTimeModel(
        k_c_s=0.002, b_c_s=0.01, k_m_s=0.001, b_m_s=0.05, k_ctx_s=1e-5, k_q_s=1e-7, k_seq_s=0.003, k_s_s=0.004
    )
    small = BatchShape(new_tokens=10, context_tokens=1000, quad_tokens2=0, num_seqs=10, draft_steps=2)
    assert model.step_s(small) == pytest.approx(0.06 + 0.01 + 0.03 + 0.008)
    large = BatchShape(new_tokens=100, context_tokens=200, quad_tokens2=100 * 500, num_seqs=1)
    assert model.step_s(large) == pytest.approx(0.21 + 0.002 + 0.005 + 0.003)
    verifies = dataclasses.replace(small, draft_tokens=6)
    assert model.step_s(verifies) == pytest.approx(model.step_s(small) + 6 * 0.003)


def test_empty_batch_takes_no_time() -> None:
    assert BatchTimeModel(1e-3, 1e-2, 0.0, 0.0).step_s(BatchShape(0)) == 0.0


def test_zero_load_is_the_whole_prompt_in_one_batch() -> None:
    model = BatchTimeModel(1e-3, 1e-2, 0.0, 0.0, k_q_s=1e-8, k_seq_s=0.002)
    assert model.zero_load_s(100) == pytest.approx(0.1 + 0.01 + 1e-4 + 0.002)


@pytest.mark.parametrize("name", ["k_c_s", "b_m_s", "k_ctx_s", "k_s_s"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_impossible_coefficients_are_refused(name: str, value: float) -> None:
    given_s = {"k_c_s": 1e-3, "b_c_s": 0.0, "k_m_s": 0.0, "b_m_s": 0.0, name: value}
    with pytest.raises(InvalidFieldError, match=name):
        BatchTimeModel(**given_s)


def test_a_model_without_a_slope_is_refused() -> None:
    with pytest.raises(InvalidFieldError, match="slope above 0"):
        BatchTimeModel(0.0, 0.1, 0.0, 0.1)


@given(model=models(), budget_s=st.floats(0.0, 10.0))
def test_roofline_tokens_is_the_inverse_of_the_roofline(model: BatchTimeModel, budget_s: float) -> None:
    tokens = roofline_tokens(model.coefficients, budget_s, 1e9)
    if tokens > 0.0:
        assert roofline_s(model.coefficients, tokens) <= budget_s * (1.0 + 1e-9) + 1e-9


@given(
    model=models(),
    budget_s=st.floats(0.0, 10.0),
    decodes=st.integers(0, 200),
    context=st.integers(0, 100_000),
    done=st.integers(0, 50_000),
)
def test_largest_chunk_is_the_largest_that_fits(
    model: BatchTimeModel, budget_s: float, decodes: int, context: int, done: int
) -> None:
    def step_s(chunk: int) -> float:
        units = chunk * (chunk + 2 * done) if chunk > 1 else 0
        return model.step_s(BatchShape(decodes + chunk, context + done, units, decodes + 1))

    room_s = budget_s - model.k_ctx_s * context - model.k_seq_s * decodes
    chunk = int(largest_chunk(model.coefficients, room_s, decodes, done))
    assert chunk >= 0
    slack = 1e-6 * (1.0 + budget_s)
    if chunk > 0:
        assert step_s(chunk) <= budget_s + slack
    assert step_s(chunk + 2) > budget_s - slack


def test_a_batch_without_a_limit_bounds_no_chunk() -> None:
    model = BatchTimeModel(1e-3, 1e-2, 0.0, 0.0, k_q_s=1e-6)
    assert largest_chunk(model.coefficients, float("inf"), 5.0, 1e5) == UNBOUNDED_TOKENS


@given(model=models(), tokens=st.integers(1, 500), done=st.integers(0, 5000), drafts=st.integers(0, 10))
def test_requests_add_up_to_the_batch(model: BatchTimeModel, tokens: int, done: int, drafts: int) -> None:
    """One prefill and one decode with drafts: the sum of their parts is the model's own answer (review, A5)."""
    c = model.coefficients
    units = tokens * (tokens + 2 * done) if tokens > 1 else 0
    shape = BatchShape(tokens + 1 + drafts, 2 * done, units, 2, drafts, drafts)
    parts_s = request_s(c, tokens, done) + decode_s(c, drafts, done)
    assert batch_s(c, tokens + 1 + drafts, parts_s, drafts) == pytest.approx(model.step_s(shape))


@given(model=models(), factor=st.floats(0.1, 10.0), tokens=st.integers(1, 4096), context=st.integers(0, 100_000))
def test_scaled_scales_every_prediction(model: BatchTimeModel, factor: float, tokens: int, context: int) -> None:
    shape = BatchShape(tokens, context, tokens * tokens, 3, 2)
    assert model.scaled(factor).step_s(shape) == pytest.approx(factor * model.step_s(shape))


@given(model=models(), tokens=st.integers(1, 4096), more=st.integers(1, 4096))
def test_more_tokens_never_take_less_time(model: BatchTimeModel, tokens: int, more: int) -> None:
    assume(model.k_c_s > 0.0)
    assert model.step_s(BatchShape(tokens + more)) >= model.step_s(BatchShape(tokens))
