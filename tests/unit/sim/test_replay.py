"""Replay: a simulated run recorded as if it were real comes back without error; broken records are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.sim.model_error import Interruptions, ModelError
from slos_serve.sim.recording import Recording
from slos_serve.sim.replay import compare, fit_speed, fitted_on, read_interruptions, read_record, replay_workload
from slos_serve.workload.scenarios import make_workload
from tests.sim_builders import GPU, run, token_times, workload


def _rows(recording: Recording) -> list[dict[str, Any]]:
    calls = recording.workload.calls
    return [
        {
            "kind": "request",
            "outcome": "completed",
            "sent_s": 3.0 + float(recording.calls["arrival_s"][i]),
            "prompt_tokens": int(calls["prompt_tokens"][i]),
            "output_tokens": int(calls["output_tokens"][i]),
            "max_tokens": int(calls["max_tokens"][i]),
            "slo_class": "chat",
            "ttft_ms": 1000.0 * float(calls["ttft_s"][i]),
            "tpot_ms": [1000.0 * float(calls["tpot_s"][i])],
            "token_times_s": [3.0 + float(recording.calls["arrival_s"][i]) + t for t in token_times(recording, i)],
        }
        for i in range(len(calls))
    ]


def test_a_simulated_run_replays_without_error(tmp_path: Path) -> None:
    real = run(make_workload("chat", 1.5, 80, arrivals="poisson"), "vllm", GPU)
    file = tmp_path / "record.jsonl"
    file.write_text('{"kind": "run"}\n' + "\n".join(json.dumps(row) for row in _rows(real)) + "\n")
    rows = read_record(file)
    again = compare(run(replay_workload(rows), "vllm", GPU), rows)
    assert again.requests == 80
    assert all(abs(error) < 1e-3 for _, _, error in (*again.ttft_ms.values(), *again.tpot_ms.values()))
    assert again.attainment[0] == again.attainment[1]
    slower = compare(run(replay_workload(rows), "vllm", GPU.scaled(1.5)), rows)
    assert slower.tpot_ms["p50"][2] > 0.3


def test_the_speed_of_a_run_is_found_from_its_first_requests() -> None:
    load = make_workload("chat", 1.0, 60, arrivals="poisson")
    rows = _rows(run(load, "vllm", GPU.scaled(1.3)))
    again = replay_workload(rows)
    factor = fit_speed(rows, lambda factor: run(again, "vllm", GPU.scaled(factor)))
    assert factor == pytest.approx(1.3, rel=0.005)
    rest = compare(run(again, "vllm", GPU.scaled(factor)), rows, skip=fitted_on(rows))
    assert rest.requests == 40
    assert abs(rest.tpot_ms["p50"][2]) < 0.01 and abs(rest.ttft_ms["p50"][2]) < 0.02


def test_a_record_says_when_the_machine_was_elsewhere(tmp_path: Path) -> None:
    load = workload([0.0, 0.9], [100, 100], [40, 40])
    taken = Interruptions([0.0, 0.2, 0.4, 5.0], [0.0, 0.0, 0.1, 0.1])
    real = run(load, error=ModelError(interruptions=taken))
    assert token_times(real, 0)[-1] == pytest.approx(token_times(run(load), 0)[-1] + 0.1, abs=1e-6)
    file = tmp_path / "record.jsonl"
    stolen = {"kind": "stolen", "t_s": [3.0, 3.2, 3.4, 8.0], "seconds": [0.0, 0.0, 0.1, 0.1]}
    file.write_text("\n".join(json.dumps(row) for row in [stolen, *_rows(real)]) + "\n")
    rows = read_record(file)
    found = read_interruptions(file, rows)
    assert found is not None and found.lost_s == pytest.approx(0.1)
    again = compare(run(replay_workload(rows), error=ModelError(interruptions=found)), rows)
    assert all(abs(error) < 1e-3 for _, _, error in (*again.ttft_ms.values(), *again.tpot_ms.values()))
    file.write_text(json.dumps(stolen | {"seconds": [0.0]}) + "\n")
    with pytest.raises(InvalidFieldError, match=r"record\.jsonl:1"):
        read_interruptions(file, rows)


def test_planning_ahead_costs_a_new_request_one_step() -> None:
    load = workload([0.0, 0.025], [100, 10], [10, 2])
    now = token_times(run(load), 1)
    ahead = token_times(run(load, plan_ahead=True), 1)
    # The step under way when it arrives ends at 30.1 ms; planned ahead, one more step of one decode comes first.
    assert ahead[0] - now[0] == pytest.approx(0.0101, abs=1e-6)


@pytest.mark.parametrize("text", ["{\n", '{"kind": "request", "outcome": "completed"}\n'])
def test_broken_records_name_the_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "record.jsonl"
    file.write_text('{"kind": "run"}\n' + text)
    with pytest.raises(InvalidFieldError, match=r"record\.jsonl:2"):
        read_record(file)


def test_empty_and_missing_records(tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    file.write_text('{"kind": "run"}\n')
    with pytest.raises(InvalidFieldError, match="at least one completed"):
        read_record(file)
    with pytest.raises(InvalidFieldError, match="existing file"):
        read_record(tmp_path / "none.jsonl")
