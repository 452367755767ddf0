"""Rules, alerts and dashboard: every metric exists, every runbook too; promtool and its tests where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from slos_serve.vllm_plugin.front.metrics import FrontMetrics
from slos_serve.vllm_plugin.metrics import EngineLabels, SchedulerMetrics

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((FOLDER / "slos-serve.rules.yml").read_text(encoding="utf-8"))
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}


def labels_of_series() -> dict[str, set[str]]:
    """Labels by series name, of both processes."""
    registry = CollectorRegistry()
    SchedulerMetrics(["chat"], EngineLabels("m", "0"), registry)
    FrontMetrics(["chat"], EngineLabels("m", "0"), registry)
    found: dict[str, set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_no_metric_has_a_label_twice() -> None:
    registry = CollectorRegistry()
    SchedulerMetrics(["chat"], EngineLabels("m", "0"), registry)
    FrontMetrics(["chat"], EngineLabels("m", "0"), registry)
    for metric in registry._collector_to_names:
        names = metric._labelnames  # type: ignore[attr-defined]  # no public way to them
        assert len(set(names)) == len(names), names


def queries() -> list[str]:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "slos-serve.json").read_text(encoding="utf-8"))
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*panels, *(rule["expr"] for group in RULES["groups"] for rule in group["rules"])]


@pytest.mark.parametrize("query", queries())
def test_a_query_selects_metrics_and_labels_that_exist(query: str) -> None:
    labels = labels_of_series()
    asked = re.findall(r"(?<!:)\b(slos_serve:\w+)(?:\{([^}]*)\})?", query)
    assert asked or any(name in query for name in RECORDED)
    for name, where in asked:
        assert name in labels, name
        assert set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", where)) <= labels[name], where
    for by in re.findall(r"by \(([^)]*)\)", query):
        known = set().union(*(labels[name] for name, _ in asked)) if asked else {"model_name"}
        assert set(by.replace(" ", "").split(",")) - {"le", "model_name", "slo_class"} <= known


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_an_alerts_runbook_is_a_section_that_names_it(alert: dict[str, dict[str, str]]) -> None:
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    text = (ROOT / page).read_text(encoding="utf-8")
    headings = {line[4:].lower().replace(" ", "-"): line for line in text.splitlines() if line.startswith("### ")}
    assert anchor in headings
    section = text.split(headings[anchor])[1].split("\n### ")[0]
    assert f"`{alert['alert']}`" in section


@pytest.mark.parametrize(("verb", "file"), [("check", "slos-serve.rules.yml"), ("test", "slos-serve.test.yml")])
def test_promtool_is_content(verb: str, file: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(
        [promtool, verb, "rules", file], cwd=FOLDER, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
