"""report: a page and PNG files from what capacity and simulate write; bad files named."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from slos_serve.cli.main import app

RUNNER = CliRunner()


def _row(policy: str, scenario: str, replicas: int = 1, **more: object) -> dict[str, object]:
    curve = [[0.5, 0.99], [1.0, 0.9], [1.5, 0.5]]
    return {
        "scenario": scenario,
        "policy": policy,
        "replicas": replicas,
        "capacity_rps_per_gpu": 1.0 + 0.1 * replicas,
        "ci": [0.9, 1.2],
        "curve": curve,
        **more,
    }


def test_capacity_page_holds_everything(tmp_path: Path) -> None:
    file = tmp_path / "cap.json"
    file.write_text(
        json.dumps([_row(policy, scenario) for policy in ("vllm", "slos-serve") for scenario in ("chat", "tool")])
    )
    result = RUNNER.invoke(app, ["report", str(file)])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "cap.html").read_text()
    assert "plotly" in page and 'src="http' not in page
    assert "attainment against rate" in page
    pictures = sorted(picture.name for picture in tmp_path.glob("*.png"))
    assert pictures == ["cap-attainment-chat.png", "cap-attainment-tool.png", "cap-capacity.png"]
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in tmp_path.glob("*.png"))


def test_scaling_and_ablation_have_charts_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "scale.json"
    file.write_text(json.dumps([_row("slos-serve", "chat", count) for count in (1, 2, 4)]))
    assert RUNNER.invoke(app, ["report", str(file)]).exit_code == 0
    assert (tmp_path / "scale-scaling.png").exists()
    file = tmp_path / "ablation.json"
    file.write_text(json.dumps([_row("slos-serve", "chat", variant=name) for name in ("all", "no holding")]))
    assert RUNNER.invoke(app, ["report", str(file)]).exit_code == 0
    assert (tmp_path / "ablation-ablation.png").exists()


def test_runs_are_overlaid(tmp_path: Path) -> None:
    files = []
    for policy in ("vllm", "edf"):
        file = tmp_path / f"{policy}.json"
        arguments = ["simulate", "--scenario", "coding", "--rate", "2", "--requests", "60", "--policy", policy]
        assert RUNNER.invoke(app, [*arguments, "--json", str(file)]).exit_code == 0
        files.append(str(file))
    result = RUNNER.invoke(app, ["report", *files, "--output", str(tmp_path / "both.html")])
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("both-timeline-*.png"))) == 10


def test_bad_results_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text in ("{", "[]", '{"a": 1}', "3"):
        file.write_text(text)
        result = RUNNER.invoke(app, ["report", str(file)])
        assert result.exit_code == 2 and "x.json" in result.output.replace("\n", "")
    assert "nothing.json" in RUNNER.invoke(app, ["report", str(tmp_path / "nothing.json")]).output.replace("\n", "")
