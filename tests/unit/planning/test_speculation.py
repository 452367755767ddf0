"""Draft lengths: the arithmetic of verifications."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.planning.speculation import (
    EXTRA_S_EACH,
    PERIOD_S,
    TOKENS_EACH,
    fastest_draft,
    paces_in_a_batch,
    table_of_lengths,
    tokens_each_verification,
)
from slos_serve.planning.tiers import Tiers
from tests.builders import OPT_13B_A100


def tiers_with(decodes: float, acceptance: float) -> Tiers:
    one = np.ones(1)
    return Tiers(0.1 * one, decodes * one, 0.0 * one, decodes * one, decodes * one, 1e-3 * one, acceptance * one)


def test_a_verification_brings_one_token_and_the_accepted_ones() -> None:
    assert tokens_each_verification(0.0, 5) == 1.0
    assert tokens_each_verification(0.5, 2) == 1.75


@pytest.mark.parametrize(("mean", "longest_s", "paces"), [(3.0, 10.0, 3.0), (3.0, 0.2, 2.0), (3.0, 0.01, 1.0)])
def test_a_batch_lasts_as_many_paces_as_tokens_come_within_bounds(mean: float, longest_s: float, paces: float) -> None:
    assert paces_in_a_batch(mean, 0.1, longest_s) == pytest.approx(paces)


def test_the_first_length_is_no_drafts() -> None:
    table = table_of_lengths(np.array([0.1]), tiers_with(10.0, 0.7), 4, 10.0, 1e-4)
    assert table.shape == (3, 1, 5)
    assert table[:, 0, 0].tolist() == pytest.approx([0.1, 1.0, 1e-3])
    assert (np.diff(table[PERIOD_S, 0]) > 0.0).all()
    assert table[TOKENS_EACH, 0, 4] == pytest.approx(5.0)
    assert table[EXTRA_S_EACH, 0, 4] == pytest.approx(1e-3 + 4e-4)


@pytest.mark.parametrize(("acceptance", "drafts"), [(0.0, False), (0.9, True)])
def test_alone_decodes_draft_where_that_is_faster(acceptance: float, drafts: bool) -> None:
    length = fastest_draft(np.array([0.1]), tiers_with(4.0, acceptance), OPT_13B_A100.coefficients, 2048.0, 10, 1.0)
    assert (length > 0) is drafts
