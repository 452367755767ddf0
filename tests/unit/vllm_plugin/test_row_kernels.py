"""Row kernels against the same arithmetic with a numpy call for each column."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.request import REQUEST_DTYPE
from slos_serve.vllm_plugin import row_kernels

NUM_ROWS = 40
NONE = np.empty(0, dtype=np.int64)


def some_rows(rng: np.random.Generator) -> np.ndarray:
    rows = np.zeros(NUM_ROWS, dtype=REQUEST_DTYPE)
    rows["prompt_tokens"] = rng.integers(1, 30, NUM_ROWS)
    rows["computed_tokens"] = rng.integers(0, 60, NUM_ROWS)
    rows["output_tokens"] = np.maximum(rows["computed_tokens"] - rows["prompt_tokens"], 0)
    rows["running"] = rng.integers(0, 2, NUM_ROWS)
    rows["blocked"] = rng.integers(0, 2, NUM_ROWS)
    rows["stage_start_s"] = np.where(rng.random(NUM_ROWS) < 0.5, np.nan, 3.0)
    rows["last_token_s"] = 2.0
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_rows_advance_by_what_was_computed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, slots = some_rows(rng), rng.permutation(NUM_ROWS)[:25]
    before, offsets, ends = rows.copy(), rng.integers(0, 3, NUM_ROWS), rng.integers(20, 70, NUM_ROWS)
    near = row_kernels.advance_rows(rows, slots, offsets, ends, 7.0)
    computed = before["computed_tokens"][slots]
    outputs = np.maximum(before["output_tokens"][slots], computed + 1 - before["prompt_tokens"][slots])
    assert rows["output_tokens"][slots].tolist() == outputs.tolist()
    assert rows["stage_tokens"][slots].tolist() == (outputs - offsets[slots]).tolist()
    assert near.tolist() == np.flatnonzero(computed + 1 >= ends[slots]).tolist()
    pending = np.isnan(before["stage_start_s"][slots]) & (outputs - offsets[slots] > 0)
    assert pending.any()
    assert (rows["stage_start_s"][slots[pending]] == 7.0).all()
    assert (rows["last_token_s"][slots[pending]] == 7.0).all()
    assert (rows["last_token_s"][slots[~pending]] == 2.0).all()
    others = np.setdiff1d(np.arange(NUM_ROWS), slots)
    assert rows[others].tobytes() == before[others].tobytes()


@pytest.mark.parametrize("drafts", [False, True])
def test_sums_of_a_batch(drafts: bool) -> None:
    rng = np.random.default_rng(1)
    rows, slots = some_rows(rng), rng.permutation(NUM_ROWS)[:25]
    tokens = rng.integers(1, 5, 25)
    drafted = np.where(rng.random(25) < 0.5, tokens - 1, 0) if drafts else NONE
    done = rows["computed_tokens"][slots].copy()
    chunks = (tokens > 1) & ((drafted == 0) if drafts else True)
    wanted = tokens.sum(), done.sum(), (tokens * (tokens + 2 * done))[chunks].sum()
    assert row_kernels.batch_sums(rows, slots, tokens, drafted, done) == wanted
    assert (rows["computed_tokens"][slots] == done).all()
    assert row_kernels.batch_sums(rows, slots, tokens, drafted, NONE) == wanted
    assert (rows["computed_tokens"][slots] == done + tokens).all()


def test_a_plan_is_sorted_into_those_that_run_and_those_that_start() -> None:
    rows = some_rows(np.random.default_rng(2))
    rows["running"][:6], rows["blocked"][:6] = (1, 1, 1, 1, 0, 0), (0, 1, 0, 0, 0, 0)
    there, listed = np.ones(NUM_ROWS, dtype=bool), np.ones(NUM_ROWS, dtype=bool)
    slots = np.array([5, 0, 1, 2, 3, 4])
    fault, runs, starts = row_kernels.sort_out(rows, slots, there, listed, np.array([2]), np.array([3]))
    assert (fault, slots[runs].tolist(), slots[starts].tolist()) == (row_kernels.RIGHT, [0], [5, 2, 4])


@pytest.mark.parametrize(
    ("slots", "fault"),
    [
        ([0, NUM_ROWS], row_kernels.OUT_OF_RANGE),
        ([-1], row_kernels.OUT_OF_RANGE),
        ([0, 1, 0], row_kernels.TWICE),
        ([0, 2], row_kernels.EMPTY),
        ([3], row_kernels.WAITS),
    ],
)
def test_a_plan_that_names_wrong_slots_is_found(slots: list[int], fault: int) -> None:
    rows = some_rows(np.random.default_rng(3))
    rows["running"][:4], rows["blocked"][:4] = 1, 0
    there, listed = np.ones(NUM_ROWS, dtype=bool), np.ones(NUM_ROWS, dtype=bool)
    there[2] = listed[3] = False
    assert row_kernels.sort_out(rows, np.array(slots), there, listed, NONE, NONE)[0] == fault
