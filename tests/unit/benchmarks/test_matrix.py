"""``python -m benchmarks.matrix``: which rivals are searched in a cell, and what the table says, on made-up curves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import matrix
from benchmarks.matrix import Cell, Row, geometric_mean, row_of, search_cell, table
from slos_serve.policies.registry import POLICIES
from slos_serve.sim import sweep
from slos_serve.sim.question import Answer, Question
from slos_serve.sim.seeds import FIRST_TEST_SEED

CELL = Cell("opt-13b-a100", "chat", "poisson")
# Rate up to which a policy attains, by mean and with every token in time.
KNEES = {"slos-serve": (3.0, 2.8), "edf": (2.0, 2.0), "sarathi": (2.5, 1.0), "vllm": (1.0, 1.0), "qoserve": (0.5, 0.5)}


def _answer(question: Question) -> Answer:
    mean, strict = (0.95 if question.rate_rps <= knee else 0.5 for knee in KNEES[question.policy])
    return Answer(mean, strict, 1.0, (mean,) * 4, (strict,) * 4, {"chat": mean}, {"chat": strict})


def _run(cell: Cell, policies: list[str]) -> tuple[Row, Counter[tuple[str, bool]]]:
    search = search_cell(cell, policies, 100, [22, 23, 24], exact=False)
    asked: Counter[tuple[str, bool]] = Counter()
    questions = next(search)
    try:
        while True:
            asked.update((one.policy, one.seed >= FIRST_TEST_SEED) for one in questions)
            questions = search.send([_answer(one) for one in questions])
    except StopIteration as end:
        return row_of(cell, end.value), asked


def test_rivals_are_screened_on_a_tuning_seed_and_the_best_three_searched_on_those_of_tables() -> None:
    row, asked = _run(CELL, ["vllm", "qoserve", "edf", "sarathi"])
    assert {policy for policy, of_table in asked if not of_table} == set(KNEES)
    assert {policy for policy, of_table in asked if of_table} == {"slos-serve", "edf", "sarathi", "vllm"}
    assert row["screened"]["vllm"] == {"rps": pytest.approx(1.0, rel=0.08), "at_most": False, "behind": True}
    assert row["mean"]["rival"] == "sarathi" and row["mean"]["over"] == pytest.approx(3.0 / 2.5, rel=0.02)
    assert row["strict"]["rival"] == "edf" and row["strict"]["over"] == pytest.approx(2.8 / 2.0, rel=0.02)
    assert 0.5 < row["of_possible"] < 2.0 and 0.5 < row["of_ideal"] < 2.0


def test_a_rival_behind_the_best_three_takes_one_simulation_for_each_parameter_set() -> None:
    row, asked = _run(CELL, ["edf", "sarathi", "vllm", "qoserve"])
    assert row["screened"]["qoserve"]["at_most"] and asked["qoserve", False] == len(POLICIES["qoserve"].variants)


def test_a_finalist_behind_the_best_by_both_metrics_is_asked_once_a_seed_and_metric() -> None:
    row, asked = _run(CELL, ["vllm", "qoserve", "edf", "sarathi"])
    # vLLM carries less than Sarathi-Serve by the mean and less than EDF with every token in time; EDF is ahead there.
    assert asked["vllm", True] == 2 * 3
    assert row["screened"]["vllm"]["behind"] and "behind" not in row["screened"]["edf"]
    assert asked["edf", True] > 2 * 3 and asked["sarathi", True] > 2 * 3


def test_a_fast_engine_gets_so_many_requests_that_they_are_no_burst() -> None:
    slow, fast = (Cell(engine, "reasoning", "poisson").num_requests for engine in ("opt-13b-a100", "llama-3.1-8b-h100"))
    assert slow == matrix.REQUESTS["reasoning"]
    assert 800 < fast < 1500  # 3.5 requests/s at the fluid bound, for five minutes
    assert CELL.num_requests >= matrix.USUAL_REQUESTS


def test_cells_behind_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, _ = _run(CELL, ["vllm", "edf", "sarathi"])
    monkeypatch.setitem(KNEES, "slos-serve", (2.4, 2.4))
    behind, _ = _run(Cell("opt-13b-a100", "coding", "poisson"), ["vllm", "edf", "sarathi"])
    lines = table([ahead, behind]).splitlines()
    assert "coding" in lines[2] and "0.95" in lines[2] and "chat" in lines[3]
    (summary,) = [line for line in lines if line.strip().startswith("2 cells")]
    assert summary.strip().startswith("2 cells, 1 of them below 1.0. Geometric mean: 1.07 by mean")
    ideal_over = [row["mean"]["over"] / row["of_ideal"] for row in (ahead, behind)]
    assert lines[-1].startswith("In the 2 cells") and f"{geometric_mean(ideal_over):.2f} times" in lines[-1]
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_where_nobody_carries_a_twentieth_of_the_bound_shares_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search would go on to rates that differ tenfold by seed."""
    shares = {
        "slos-serve": (0.6, 0.6),
        "edf": (0.5, 0.2),
        "sarathi": (0.45, 0.3),
        "vllm": (0.1, 0.1),
        "qoserve": (0.0, 0.0),
    }
    asked: list[Question] = []

    def of(question: Question) -> Answer:
        asked.append(question)
        return Answer(*shares[question.policy])

    monkeypatch.setitem(globals(), "_answer", of)
    row, _ = _run(CELL, ["vllm", "qoserve", "edf", "sarathi"])
    assert row["flat"] and row["mean"]["rival"] == "edf" and row["strict"]["rival"] == "sarathi"
    assert row["mean"]["over"] == pytest.approx(0.6 / 0.5) and row["strict"]["over"] == pytest.approx(0.6 / 0.3)
    rates = sorted({one.rate_rps for one in asked})
    assert len(rates) == 2 and rates[1] == pytest.approx(10.0 * rates[0])
    assert {one.policy for one in asked if one.seed >= FIRST_TEST_SEED} == {"slos-serve", "edf", "sarathi", "vllm"}
    lines = table([row]).splitlines()
    assert lines[-1] == "| opt-13b-a100 | chat | poisson | 60.0% | 50.0% (edf) | 60.0% | 30.0% (sarathi) |"
    assert matrix.charts([row]) == []


def test_finished_cells_are_kept_and_not_simulated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated: list[Question] = []

    def simulate(question: Question) -> Answer:
        simulated.append(question)
        return _answer(question)

    monkeypatch.setattr(sweep, "answer", simulate)
    arguments = ["--engine", "opt-13b-a100", "--scenario", "chat", "--arrivals", "poisson", "--processes", "1"]
    arguments += ["--policy", "edf", "--policy", "sarathi", "--quick", "--output", str(tmp_path)]
    assert matrix.main(arguments) == 0
    first = len(simulated)
    assert first > 20 and all(one.num_requests == 100 for one in simulated)
    (row,) = json.loads((tmp_path / "matrix.json").read_text())
    assert row["mean"]["rival"] == "sarathi" and len(row["capacities"]) == 3
    assert (tmp_path / "matrix-opt-13b-a100.png").stat().st_size > 1000
    assert matrix.main(arguments) == 0
    assert len(simulated) == first
