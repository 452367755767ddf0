"""The ``profile`` command around a measurement: files, report, goal and errors. The engine is tested in tests/vllm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slos_serve.cli import profile as command
from slos_serve.cli.main import app
from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.profile_file import Profile, load_profile, load_samples, samples_path
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.fit import Sample
from slos_serve.perf.residuals import RegionError, error_by_region, ratio_quantiles

MODEL = BatchTimeModel(2e-3, 1e-2, 0.0, 0.0, k_seq_s=3e-3)
SAMPLES = [Sample(BatchShape(n, num_seqs=n), MODEL.step_s(BatchShape(n, num_seqs=n))) for n in range(1, 30)]
PROFILE = Profile(
    model_name="m",
    device="Some [fast] CPU",
    engine="vllm",
    engine_version="0.32.0",
    created="2026-01-02T03:04:05+00:00",
    dtype="bfloat16",
    tensor_parallel=1,
    kv_capacity_tokens=1280,
    block_size=128,
    max_num_batched_tokens=2048,
    model=MODEL,
    residual_quantiles=ratio_quantiles(MODEL, SAMPLES),
    fit=error_by_region(MODEL, SAMPLES),
)


class Measured:
    """Stands in for a run of the engine."""

    profile = PROFILE
    samples = SAMPLES
    num_disturbed = 3
    async_scheduling = False
    max_num_seqs = 64


def measured(model: str, vllm_args: tuple[str, ...], duration_s: float, seed: int) -> Measured:
    assert (model, vllm_args, duration_s, seed) == ("m", ("--max-model-len", "512"), 5.0, 7)
    return Measured()


def test_profile_chart_samples_and_report_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_measure", measured)
    path, report = tmp_path / "p.json", tmp_path / "r.json"
    arguments = ["profile", "m", "--duration", "5", "--seed", "7", "--max-model-len", "512"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(path), "--json", str(report)])
    assert result.exit_code == 0, result.output
    assert load_profile(path) == PROFILE
    assert len(load_samples(samples_path(path))) == len(SAMPLES)
    assert (tmp_path / "p.png").is_file()
    assert json.loads(report.read_text())["goal_met"] is True
    assert "decode only" in result.output
    assert "Some [fast] CPU" in result.output
    assert "warning" not in result.output


def test_without_output_it_lands_where_serve_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_measure", lambda *_args: Measured())
    monkeypatch.setenv("SLOS_SERVE_CACHE", str(tmp_path))
    assert CliRunner().invoke(app, ["profile", "m"]).exit_code == 0
    assert sorted(path.suffix for path in (tmp_path / "profiles").iterdir()) == [".csv", ".json", ".png"]


def test_a_bad_fit_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Noisy(Measured):
        profile = replace(PROFILE, fit={"all": replace(PROFILE.fit["all"], p90=0.3)})

    monkeypatch.setattr(command, "_measure", lambda *_args: Noisy())
    result = CliRunner().invoke(app, ["profile", "m", "--output", str(tmp_path / "p.json")])
    assert result.exit_code == 0
    assert "was the machine busy" in " ".join(result.output.split())


def test_a_field_that_cannot_be_used_is_one_line_and_status_two(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_args: object) -> Measured:
        raise InvalidFieldError("duration", -1.0, "seconds, above 0")

    monkeypatch.setattr(command, "_measure", refused)
    result = CliRunner().invoke(app, ["profile", "m"])
    assert result.exit_code == 2
    assert "duration: got -1.0; allowed: seconds, above 0" in " ".join(result.output.split())


GOOD = PROFILE.fit["all"]


@pytest.mark.parametrize(
    "error",
    [replace(GOOD, median=0.06), replace(GOOD, p90=0.16), replace(GOOD, r2=0.94), replace(GOOD, r2=None)],
)
def test_the_goal_needs_every_part(error: RegionError) -> None:
    assert command.meets_goal(PROFILE)
    assert not command.meets_goal(replace(PROFILE, fit={"all": error}))
