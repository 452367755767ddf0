"""``python -m benchmarks.separation``: the mix, who is served apart, and what the tables make of made-up results."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from benchmarks import separation
from benchmarks.separation import (
    CLASSES,
    SHARES,
    SPLIT,
    Case,
    Found,
    capacity,
    capacity_table,
    joined,
    lengths_off,
    load_table,
    mix,
    pairs,
    parts_of,
)
from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.lengths import LengthForecast
from slos_serve.sim.outcome import Outcome

CASE = Case("slos-serve", "slo", "opt-13b-a100", 4, 100)


def test_the_mix_has_its_shares_and_differs_between_rates_by_time_alone() -> None:
    slow, fast = mix(2.0, 4000, 22), mix(8.0, 4000, 22)
    counts = np.bincount(slow.calls["class_index"]) / 4000
    assert counts == pytest.approx(SHARES, abs=0.02)
    for name in ("prompt_tokens", "output_tokens", "class_index"):
        assert (slow.calls[name] == fast.calls[name]).all()
    assert slow.calls["arrival_s"] == pytest.approx(4.0 * fast.calls["arrival_s"])


def test_a_split_serves_every_request_once_on_all_servers() -> None:
    workload = mix(4.0, 500, 22)
    parts = list(parts_of(workload, replace(CASE, router=SPLIT, chat_servers=3)))
    assert [servers for _, _, servers in parts] == [3, 1]
    assert sum(part.num_requests for part, _, _ in parts) == 500
    assert sum(measured.sum() for _, measured, _ in parts) == next(parts_of(workload, CASE))[1].sum()
    chat, rest = (part.calls for part, _, _ in parts)
    assert (chat["class_index"] == 0).all() and (rest["class_index"] > 0).all()
    for calls in (chat, rest):
        assert (calls["session"] == np.arange(len(calls))).all()


def test_parts_count_by_their_requests_and_a_run_cut_short_by_what_was_possible() -> None:
    def outcome(requests: int, attained: int, by_class: dict[str, float]) -> Any:
        made = mock.create_autospec(Outcome, instance=True)
        made.requests, made.attainment, made.strict = requests, attained / requests, 0.5
        made.admitted, made.admitted_attained, made.by_class = attained + 1, attained, by_class
        return made

    chat, rest = outcome(75, 60, {"chat": 0.8, "agent": float("nan")}), outcome(25, 20, {"agent": 0.6})
    found = joined([(chat, 1.0), (rest, 0.4)])
    assert found.attained == pytest.approx((60 + 0.4 * 25) / 100)
    assert found.strict == pytest.approx((37.5 + 0.4 * 25) / 100)
    assert (found.promised, found.kept) == pytest.approx((0.82, 0.80))
    assert found.by_class == {"chat": 0.8, "agent": 0.6}


def test_lengths_are_learnt_wrong_only_inside() -> None:
    def learnt() -> float:
        forecast = LengthForecast(1)
        for _ in range(200):
            forecast.observe(0, 100)
        return float(forecast.table()[0, 0])

    true = learnt()
    with lengths_off(3.0):
        assert learnt() == pytest.approx(3.0 * true, rel=0.15)
    assert learnt() == true


def test_capacity_is_where_each_metric_crosses() -> None:
    def curve(_case: Case, rate_rps: float, _seed: int, stop: bool = False) -> Found:
        assert stop
        return Found(attained=1.0 - rate_rps / 100.0, strict=1.0 - rate_rps / 50.0)

    with mock.patch.object(separation, "run", curve):
        found = capacity(CASE, 3.0, 22)
    assert found == pytest.approx({"attained": 10.0, "strict": 5.0}, rel=0.02)


def test_a_run_that_is_too_short_has_no_capacity() -> None:
    with (
        mock.patch.object(separation, "run", return_value=Found(1.0, 1.0)),
        pytest.raises(InvalidFieldError, match="--span"),
    ):
        capacity(CASE, 3.0, 22)


def test_tables_name_who_is_missing_and_what_together_carries_over_apart() -> None:
    rows = [
        {
            **asdict(replace(CASE, router=router, scheduler=one, chat_servers=3 if router == SPLIT else 0)),
            "attained": [6.0, 6.0] if router == "slo" else [4.0, 4.0],
            "strict": [3.0, 3.0],
        }
        for router, one in pairs()
    ]
    told = capacity_table(rows)
    assert "| slo | - | - | - | 6 (6-6) / 3 (3-3) |" in told and "3 (3-3) 3+1 |" in told
    assert told.endswith("1.50 (1.50-1.50) and 1.00 (1.00-1.00) times, by the two metrics.")
    by_class = dict.fromkeys([one.name for one in CLASSES], 1.0)
    loads = [
        {"load": load, **asdict(Found(0.75, 0.5, promised=0.8, kept=0.6, by_class=by_class))}
        for load in separation.LOADS
    ]
    assert "| 1.3 | 80.0 | 60.0 | 75.0 | 50.0 | 75.0 |" in load_table(loads)
