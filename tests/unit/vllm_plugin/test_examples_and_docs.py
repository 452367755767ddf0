"""The shipped class file, dashboard and metrics table agree with the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

from scripts import render_dashboard
from slos_serve.files.class_file import load_classes
from slos_serve.vllm_plugin.capabilities import CAPABILITIES, Support, as_markdown
from slos_serve.vllm_plugin.front.metrics import FrontMetrics
from slos_serve.vllm_plugin.metrics import EngineLabels, SchedulerMetrics

ROOT = Path(__file__).parents[3]
DOC = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")


def series() -> set[str]:
    registries = SchedulerMetrics([]).registry, FrontMetrics([], EngineLabels()).registry
    families = [family for registry in registries for family in registry.collect()]
    counters = {f"{family.name}_total" for family in families if family.type == "counter"}
    return counters | {family.name for family in families if family.type != "counter"}


def test_the_example_class_file_is_right() -> None:
    classes = load_classes(ROOT / "examples" / "classes.yaml")
    assert classes.default == "chat"
    assert list(classes.classes) == ["chat", "code", "reason", "batch"]


def test_the_page_lists_every_metric_and_no_other() -> None:
    listed = set(re.findall(r"^\| `(slos_serve:[a-z_]+)`", DOC, re.MULTILINE))
    assert listed == series()


def test_the_dashboard_asks_only_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "slos-serve.json").read_text(encoding="utf-8"))
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    asked = {name.removesuffix("_bucket") for name in re.findall(r"slos_serve:[a-z_]+", queries)}
    assert asked == series()


def test_the_dashboard_is_the_one_that_its_script_writes() -> None:
    assert render_dashboard.TARGET.read_text(encoding="utf-8") == render_dashboard.text()


def test_the_page_shows_the_table_of_capabilities() -> None:
    shown = re.search(r"<!-- capabilities -->\n(.*?)\n<!-- /capabilities -->", DOC, re.DOTALL)
    assert shown is not None
    assert shown[1] == as_markdown()


def test_every_steered_row_names_a_test_that_exists() -> None:
    for row in CAPABILITIES:
        path, _, name = row.proof.partition("::")
        assert bool(row.proof) == (row.support == Support.STEERED), row.feature
        if path:
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not name or f"def {name}(" in text, row.proof
