"""The scheduler's metrics: what each event counts, bounded labels, and the way to another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from slos_serve.vllm_plugin.metrics import SchedulerMetrics


def value(metrics: SchedulerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"slos_serve:{name}", labels)


def test_every_series_exists_from_the_start() -> None:
    metrics = SchedulerMetrics(["chat"])
    for name in ("chat", "custom"):
        assert value(metrics, "attained_total", slo_class=name) == 0.0
        assert value(metrics, "slo_violation_total", slo_class=name, type="ttft") == 0.0
    assert value(metrics, "requests_total", slo_class="none", verdict="none") == 0.0
    assert value(metrics, "step_fallback_total", kind="overrun") == 0.0
    assert value(metrics, "attained_total", slo_class="none") is None


@pytest.mark.parametrize(
    ("ttft_ok", "tpot_ok", "counts"), [(True, True, (1, 0, 0)), (False, True, (0, 1, 0)), (False, False, (0, 1, 1))]
)
def test_a_request_attains_or_violates(ttft_ok: bool, tpot_ok: bool, counts: tuple[int, int, int]) -> None:
    metrics = SchedulerMetrics(["chat"])
    metrics.request_done("chat", "admitted", ttft_ok, tpot_ok)
    assert value(metrics, "requests_total", slo_class="chat", verdict="admitted") == 1.0
    assert (
        value(metrics, "attained_total", slo_class="chat"),
        value(metrics, "slo_violation_total", slo_class="chat", type="ttft"),
        value(metrics, "slo_violation_total", slo_class="chat", type="tpot"),
    ) == counts


def test_labels_are_never_what_a_client_wrote() -> None:
    metrics = SchedulerMetrics(["chat"])
    before = sum(len(list(family.samples)) for family in metrics.registry.collect())
    metrics.request_done("../../etc", "best_effort", True, True)
    metrics.request_done(None, "none", True, True)
    metrics.request_ended("chat", "aborted")
    metrics.request_ended("chat", "error")
    metrics.fallback("a new kind")
    metrics.preempted("a new kind", 2)
    assert sum(len(list(family.samples)) for family in metrics.registry.collect()) == before
    assert value(metrics, "requests_total", slo_class="custom", verdict="best_effort") == 1.0
    assert value(metrics, "requests_total", slo_class="none", verdict="none") == 1.0
    assert value(metrics, "requests_total", slo_class="chat", verdict="aborted") == 1.0
    assert value(metrics, "requests_total", slo_class="chat", verdict="error") == 1.0
    assert value(metrics, "step_fallback_total", kind="other") == 1.0
    assert value(metrics, "preemptions_total", kind="other") == 2.0


def test_steps_are_counted() -> None:
    metrics = SchedulerMetrics([], CollectorRegistry())
    metrics.plan(0.0003)
    metrics.invalid_field()
    metrics.held(3)
    metrics.held(0)
    metrics.preempted("slo", 0)
    metrics.queue("running", 1, 2, 3)
    metrics.queue("running", 1, 2, 0)
    metrics.correction(1.234)
    assert value(metrics, "plan_seconds_count") == 1.0
    assert value(metrics, "plan_seconds_bucket", le="0.0005") == 1.0
    assert value(metrics, "plan_seconds_bucket", le="0.00025") == 0.0
    assert value(metrics, "invalid_slo_fields_total") == 1.0
    assert value(metrics, "held_decodes_total") == 3.0
    assert value(metrics, "preemptions_total", kind="slo") == 0.0
    assert value(metrics, "queue_requests", queue="running", verdict="admitted") == 2.0
    assert value(metrics, "queue_requests", queue="running", verdict="best_effort") == 0.0
    assert value(metrics, "batch_time_correction") == 1.23


WRITER = """
from slos_serve.vllm_plugin.metrics import SchedulerMetrics
metrics = SchedulerMetrics(["chat"])
metrics.request_done("chat", "admitted", True, True)
metrics.queue("waiting", 4, 0, 0)
metrics.plan(0.001)
"""
READER = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_another_process_sees_them(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for program in (WRITER, READER):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
    assert 'slos_serve:attained_total{slo_class="chat"} 1.0' in done.stdout
    assert 'slos_serve:queue_requests{queue="waiting",verdict="undecided"} 4.0' in done.stdout
    assert "slos_serve:plan_seconds_count 1.0" in done.stdout
