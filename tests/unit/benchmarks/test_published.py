"""``python -m benchmarks.published``: who is compared with whom, on made-up results."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks import tables
from benchmarks.published import LOADS, OURS, Case, Found, cases_of, compared, keep, over_best, rows_of
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.profiles import profile_names
from slos_serve.workload.scenarios import SCENARIOS


def found(kept: float, goodput: float) -> Found:
    return Found(kept, kept, {"interactive": kept}, goodput, 2.0 * goodput, 0.0)


ROWS = [
    (Case("tiers", "opt-13b-a100", 3.0, "vllm", False, (22,)), found(0.5, 50.0)),
    (Case("tiers", "opt-13b-a100", 3.0, "qoserve", False, (22,)), found(0.8, 40.0)),
    (Case("tiers", "opt-13b-a100", 3.0, "jitserve-oracle", False, (22,)), found(0.99, 99.0)),
    (Case("tiers", "opt-13b-a100", 3.0, OURS, False, (22,)), found(0.9, 45.0)),
    (Case("tiers", "opt-13b-a100", 3.0, OURS, True, (22,)), found(1.0, 60.0)),
]


def test_the_best_rival_is_one_that_knows_no_true_lengths() -> None:
    assert over_best(ROWS, "kept") == (0.9 / 0.8, "qoserve")
    assert over_best(ROWS, "goodput_tokens_per_s") == (45.0 / 50.0, "vllm")
    (line,) = compared(ROWS)
    assert "kept 1.12 times qoserve's" in line and "goodput 0.90 times vllm's" in line
    assert "0.90 of what true lengths would keep" in line


def test_what_was_found_is_kept_and_makes_the_table(tmp_path: Path) -> None:
    keep(tmp_path, ROWS[:4])
    rows = json.loads((tmp_path / "published.json").read_text(encoding="utf-8"))
    assert [found for _, found in rows_of(rows)] == [found for _, found in ROWS[:4]]
    assert rows[1] == {**asdict(ROWS[1][0]), **asdict(ROWS[1][1]), "seeds": [22]}
    assert "| tiers | opt-13b-a100 | 3 | 50.0 | 80.0 | 99.0 | 90.0 | 1.12 | 1.12 | 0.90 |" in tables.published(rows)


def test_every_workload_and_engine_is_there() -> None:
    assert set(LOADS) <= set(SCENARIOS)
    assert {engine for loads in LOADS.values() for engine in loads} <= set(profile_names())
    given = argparse.Namespace(workload=["users"], engine=None, policy=["qoserve", OURS], seeds=[22])
    cases = list(cases_of(given))
    assert [case.name for case in cases[:3]] == ["qoserve", OURS, f"{OURS}, true lengths"]
    assert len(cases) == 3 * sum(map(len, LOADS["users"].values())) and OURS in POLICIES
