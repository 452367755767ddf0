"""Two servers beside each other: ratios and their intervals."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from slos_serve.bench import comparison
from slos_serve.bench.comparison import Comparison, Measured, compared
from slos_serve.bench.run import BenchRun, BenchSettings


def side(speeds: list[float], kept: int = 5) -> list[Measured]:
    return [Measured(10, kept, speed, 100.0, math.nan, 0) for speed in speeds]


def test_the_ratio_is_of_each_round_and_its_interval_takes_six() -> None:
    found = Comparison(side([100, 200, 400, 100, 200, 400]), side([110, 220, 440, 120, 240, 480], kept=8))
    ratio = found.ratio("output_tokens_per_s")
    assert ratio.median == pytest.approx(1.15) and (ratio.low, ratio.high) == pytest.approx((1.1, 1.2))
    assert found.more_kept().median == pytest.approx(30.0)
    few = Comparison(side([100, 200]), side([110, 220]))
    assert few.ratio("output_tokens_per_s").high == math.inf and few.more_kept().low == -math.inf


def test_a_number_that_one_side_lacks_leaves_its_round_out() -> None:
    found = Comparison(side([100, 100]), side([0, 150]))
    assert math.isnan(found.ratio("tpot_p50_ms").median)
    assert found.as_json(("a", "b"))["ratios"]["tpot_p50_ms"]["median"] is None
    assert ("TPOT p50 ms", "nan", "nan", "-") in found.rows()


def test_rounds_take_turns_and_share_their_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []

    def of(name: str) -> Any:
        async def run(settings: BenchSettings) -> str:
            order.append((name, settings.seed))
            return name

        return run

    def measured(run: BenchRun) -> Measured:
        return Measured(1, 1 if str(run) == "b" else 0, 1.0, 1.0, 1.0, 0)

    monkeypatch.setattr(comparison, "measured_of", measured)
    found = asyncio.run(compared(BenchSettings(seed=7), of("a"), of("b"), 3))
    assert order == [("a", 7), ("b", 7), ("b", 8), ("a", 8), ("a", 9), ("b", 9)]
    assert [one.kept for one in found.a] == [0, 0, 0] and [one.kept for one in found.b] == [1, 1, 1]
