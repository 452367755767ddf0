"""simulate, capacity and size from the command line: results on disk, and bad input named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from slos_serve.cli.capacity import _searchable, tables
from slos_serve.cli.main import app
from slos_serve.cli.printed import FILE_WIDTH
from slos_serve.core.errors import InvalidFieldError
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.search import Capacity
from slos_serve.workload.scenarios import SCENARIOS

RUNNER = CliRunner()
A_CAPACITY = Capacity(
    scenario="chat",
    policy="vllm",
    profile="opt-13b-a100",
    replicas=1,
    arrivals="poisson",
    capacity_rps_per_gpu=11.5,
    ci=(11.0, 12.0),
    by_seed=[11.5],
    strict_rps_per_gpu=8.0,
    strict_ci=(7.0, 9.0),
    strict_by_seed=[8.0],
    attainment=0.9,
    fluid_bound_rps_per_gpu=20.0,
    fluid_bound_speculative_rps_per_gpu=30.0,
    fluid_bound_dropping_rps_per_gpu=25.0,
    parameters={},
    tried=[],
    curve=[],
    admitted_attained=None,
    by_prompt_quartile=[1.0, 1.0, 0.9, 0.8],
    strict=0.8,
    at_capacity={},
    num_requests=100,
    seeds=[30],
    oracle_lengths=False,
    conditions={},
)


def test_simulate_writes_what_it_prints(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    arguments = ["simulate", "--scenario", "coding", "--rate", "1", "--requests", "40", "--policy", "vllm"]
    result = RUNNER.invoke(app, [*arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["requests"] == 40 and 0.0 <= written["attainment"] <= 1.0
    again = tmp_path / "again.json"
    RUNNER.invoke(app, [*arguments, "--json", str(again)])
    assert json.loads(again.read_text())["digest"] == written["digest"]


def test_simulate_with_a_drafter_counts_what_was_right(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    arguments = ["simulate", "--scenario", "chat", "--rate", "1", "--requests", "40", "--acceptance", "0.7"]
    result = RUNNER.invoke(app, [*arguments, "--drafter", "opt-125m", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "drafts right" in result.output
    speed = json.loads(file.read_text())["speed"]
    assert 0 < speed["accepted"] < 0.7 * speed["drafted"]
    refused = RUNNER.invoke(app, [*arguments, "--drafter", "opt-7b"])
    assert refused.exit_code == 2 and "drafter" in refused.output


def test_capacity_writes_one_row_a_search(tmp_path: Path) -> None:
    file = tmp_path / "cap.json"
    arguments = [
        "capacity",
        "--scenario",
        "coding",
        "--policy",
        "vllm:token_budget=8192",
        "--policy",
        "sarathi:chunk_tokens=512",
    ]
    result = RUNNER.invoke(
        app, [*arguments, "--requests", "40", "--seeds", "1", "--processes", "1", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert [row["policy"] for row in rows] == ["vllm", "sarathi"]
    wanted = {
        "scenario",
        "policy",
        "replicas",
        "arrivals",
        "capacity_rps_per_gpu",
        "ci",
        "attainment",
        "fluid_bound_rps_per_gpu",
    }
    assert all(wanted <= set(row) for row in rows)
    for row in rows:
        line = next(line for line in result.output.splitlines() if row["policy"] in line.split())
        assert f"{row['capacity_rps_per_gpu']:.2f} ({row['ci'][0]:.2f}-{row['ci'][1]:.2f})" in line


def test_every_policy_is_legible_in_the_table_of_capacities() -> None:
    found = replace(A_CAPACITY, ci=(10.25, 12.75))
    rows = [replace(found, scenario=name, policy=policy) for name in SCENARIOS for policy in POLICIES]
    with (console := Console(width=FILE_WIDTH)).capture() as shown:
        for table in tables(rows):
            console.print(table)
    assert all(name in shown.get() for name in (*SCENARIOS, *POLICIES)) and "\u2026" not in shown.get()
    assert shown.get().count("11.50 (10.25-12.75)") == len(rows)


def test_capacity_says_when_a_run_is_too_short_for_the_deadlines() -> None:
    arguments = ["capacity", "--seeds", "1", "--processes", "1", "--profile", "llama-3.1-8b-h100", "--requests", "20"]
    none_too_high = RUNNER.invoke(app, [*arguments, "--scenario", "answers", "--policy", "vllm:token_budget=8192"])
    assert none_too_high.exit_code == 2
    assert "--requests: got 20; allowed: 1300 or more" in none_too_high.stderr
    beyond = RUNNER.invoke(app, [*arguments, "--scenario", "batch-with-deadline", "--policy", "vllm:token_budget=8192"])
    assert beyond.exit_code == 0, beyond.output
    assert "(at most 17.08)" in beyond.stderr and "ask for at least 1600 requests (--requests)" in beyond.stderr
    usual = RUNNER.invoke(
        app, ["capacity", *arguments[1:5], "--scenario", "coding", "--policy", "vllm", "--requests", "60"]
    )
    assert usual.exit_code == 0 and "--requests" not in usual.stderr


def test_size_prints_writes_and_draws_every_way(tmp_path: Path) -> None:
    trace, file, chart = tmp_path / "trace.csv", tmp_path / "size.json", tmp_path / "size.svg"
    lines = [f"{0.2 * i},500,50" for i in range(100)]
    trace.write_text("Timestamp,Request tokens,Response tokens\n" + "\n".join(lines) + "\n")
    where = ["--trace", str(trace), "--json", str(file), "--plot", str(chart)]
    result = RUNNER.invoke(app, ["size", *where, "--policy", "vllm", "--violations", "0.1"])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert [size["by"] for size in found["sizes"]] == ["vllm, 10 %", "mean load", "vLLM's throughput"]
    assert all(size["servers_at_peak"] >= 1 and size["kwh"] > 0.0 for size in found["sizes"])
    assert found["peak_rps"] == pytest.approx(5.05, abs=0.1) and "vllm, 10 %" in result.output
    assert "<svg" in chart.read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["simulate", "--scenario", "chatt", "--rate", "1"], "summarization"),
        (["simulate", "--scenario", "chat", "--rate", "1", "--policy", "vlm"], "sarathi"),
        (["simulate", "--scenario", "chat"], "--rate"),
        (["simulate", "--rate", "1"], "--scenario"),
        (["simulate", "--scenario", "chat", "--rate", "1", "--profile", "gpu"], "opt-13b-a100"),
        (["simulate", "--scenario", "chat", "--rate", "1", "--arrivals", "often"], "azure-code"),
        (["simulate", "--scenario", "chat", "--rate", "1", "--policy", "vllm:x=1"], "parameters of vllm"),
        (["simulate", "--scenario", "chat", "--rate", "1", "--policy", "vllm:x"], "key=value"),
        (["simulate", "--scenario", "chat", "--rate", "1", "--kill", "soon"], "SECONDS:REPLICA"),
        (["capacity", "--scenario", "chatt"], "summarization"),
        (["capacity", "--policy", "vlm"], "sarathi"),
        (["size", "--trace", "nowhere.csv"], "nowhere.csv"),
        (["size", "--mix", "nowhere.yaml"], "nowhere.yaml"),
        (["size"], "one of the two"),
        (["size", "--trace", "nowhere.csv", "--watts", "-1"], "--watts"),
        (["size", "--trace", "nowhere.csv", "--idle-watts", "nan"], "--idle-watts"),
        (["simulate", "--scenario", "chat", "--rate", "1e-308"], "rate: got 1e-308"),
        (["simulate", "--scenario", "chat", "--rate", "1", "--seed", "9" * 23], "--seed"),
        (["simulate", "--scenario", "chat", "--rate", "1", "--policy", "vllm", "--kill", "inf:0"], "deaths"),
        (["simulate", "--scenario", "chat", "--rate", "1", "--policy", "vllm", "--kill", "nan:0"], "deaths"),
        (["capacity", "--scenario", "chat", "--policy", "vllm", "--resume", "examples"], "cannot be written"),
        (["capacity", "--scenario", "chat", "--policy", "vllm", "--resume", "README.md"], "a file that --resume began"),
        (["size", "--mix", "examples/mix.yaml"], "class file"),
    ],
)
def test_bad_input_is_named(arguments: list[str], named: str) -> None:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    assert named in result.output


def test_broken_trace_lines_and_impossible_slos_carry_their_line(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("Timestamp,Request tokens,Response tokens,tpot_ms\n0,5,5,\n1,x,5,\n")
    assert "trace.csv:3" in RUNNER.invoke(app, ["simulate", "--trace", str(trace)]).output.replace("\n", "")
    trace.write_text("Timestamp,Request tokens,Response tokens,tpot_ms\n0,5,5,0\n")
    output = RUNNER.invoke(app, ["size", "--trace", str(trace)]).output.replace("\n", "")
    assert "trace.csv:2: tpot_ms" in output


def test_a_full_disk_is_named() -> None:
    command = ["simulate", "--scenario", "chat", "--rate", "2", "--requests", "5", "--policy", "vllm"]
    result = RUNNER.invoke(app, [*command, "--json", "/dev/full"])
    assert result.exit_code == 1
    assert "/dev/full cannot be written: No space left on device" in result.output


@pytest.mark.parametrize(
    ("option", "suffix", "text"),
    [
        ("--classes", "yaml", "classes: " + "[" * 5000),
        ("--mix", "yaml", "mix: " + "[" * 5000),
        ("--profile", "json", "[" * 100_000),
    ],
)
def test_endless_nesting_is_named(tmp_path: Path, option: str, suffix: str, text: str) -> None:
    deep = tmp_path / f"deep.{suffix}"
    deep.write_text(text)
    whole = {"--mix": "examples/mix.yaml", "--classes": "examples/classes.yaml"} | {option: str(deep)}
    result = RUNNER.invoke(app, ["size", *(part for pair in whole.items() for part in pair)])
    assert result.exit_code == 2
    assert deep.name in result.output.replace("\n", "")


def test_a_trace_takes_a_rate_where_it_has_one(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    command = ["simulate", "--trace", str(trace), "--policy", "vllm", "--rate"]
    trace.write_text("Timestamp,Request tokens,Response tokens\n0,5,5\n0,5,5\n")
    assert "--rate: got 2.0; allowed: none" in RUNNER.invoke(app, [*command, "2"]).output
    trace.write_text("Timestamp,Request tokens,Response tokens,session,pause_ms\n0,5,5,a,\n1,9,5,a,10\n2,5,5,b,\n")
    assert RUNNER.invoke(app, [*command, "2"]).exit_code == 0
    for given in ("0", "-1", "nan", "1e300", "1e-300"):
        assert (
            f"--rate: got {float(given)}; allowed: a number in [1e-09, 1e+06]"
            in RUNNER.invoke(app, [*command, given]).output
        )


def test_all_leaves_out_what_the_engine_cannot_keep_and_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _searchable(["chat", "users"], "opt-13b-a100", leave_out=True) == ["chat"]
    assert "users is left out" in capsys.readouterr().err
    with pytest.raises(InvalidFieldError, match="scenario: got 'users'"):
        _searchable(["chat", "users"], "opt-13b-a100", leave_out=False)
