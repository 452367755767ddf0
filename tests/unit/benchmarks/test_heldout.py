"""``python -m benchmarks.heldout``: loads of other engines."""

from __future__ import annotations

import pytest

from benchmarks.heldout import RATES_RPS, TUNED_ON, rate_on


@pytest.mark.parametrize("scenario", ["chat", "mixed"])
def test_a_faster_engine_gets_more_of_the_same(scenario: str) -> None:
    assert rate_on(TUNED_ON, scenario) == RATES_RPS[scenario]
    assert 2.0 < rate_on("llama-2-7b-h100", scenario) / RATES_RPS[scenario] < 8.0
