"""The scheduler's metrics: what each event counts, bounded labels, and the way to another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from slos_serve.core.verdict import Verdict
from slos_serve.vllm_plugin.metrics import EngineLabels, Kept, SchedulerMetrics

LABELS = EngineLabels("m", "1")
KEPT = Kept(True, True)


def value(metrics: SchedulerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"slos_serve:{name}", {"model_name": "m", "engine": "1"} | labels)


def test_every_series_exists_from_the_start() -> None:
    metrics = SchedulerMetrics(["chat"], LABELS)
    for name in ("chat", "custom"):
        assert value(metrics, "attained_total", slo_class=name, verdict="admitted") == 0.0
        assert value(metrics, "slo_violation_total", slo_class=name, verdict="best-effort", type="ttft") == 0.0
    assert value(metrics, "requests_total", slo_class="none", verdict="no-slo") == 0.0
    assert value(metrics, "step_fallback_total", kind="overrun") == 0.0
    assert value(metrics, "attained_total", slo_class="none", verdict="no-slo") is None


@pytest.mark.parametrize(
    ("ttft_ok", "tpot_ok", "counts"), [(True, True, (1, 0, 0)), (False, True, (0, 1, 0)), (False, False, (0, 1, 1))]
)
def test_a_request_attains_or_violates(ttft_ok: bool, tpot_ok: bool, counts: tuple[int, int, int]) -> None:
    metrics = SchedulerMetrics(["chat"], LABELS)
    metrics.request_done("chat", Verdict.ADMITTED, Kept(ttft_ok, tpot_ok))
    assert value(metrics, "requests_total", slo_class="chat", verdict="admitted") == 1.0
    assert (
        value(metrics, "attained_total", slo_class="chat", verdict="admitted"),
        value(metrics, "slo_violation_total", slo_class="chat", verdict="admitted", type="ttft"),
        value(metrics, "slo_violation_total", slo_class="chat", verdict="admitted", type="tpot"),
    ) == counts


def test_labels_are_never_what_a_client_wrote() -> None:
    metrics = SchedulerMetrics(["chat"], LABELS)
    before = sum(len(list(family.samples)) for family in metrics.registry.collect())
    metrics.request_done("../../etc", Verdict.BEST_EFFORT, KEPT)
    metrics.request_done(None, Verdict.NO_SLO, KEPT)
    metrics.answered("../../etc", 10, 8.0)
    metrics.request_ended("chat", "aborted")
    metrics.request_ended("chat", "error")
    metrics.fallback("a new kind")
    metrics.preempted("a new kind", 2)
    assert sum(len(list(family.samples)) for family in metrics.registry.collect()) == before
    assert value(metrics, "requests_total", slo_class="custom", verdict="best-effort") == 1.0
    assert value(metrics, "requests_total", slo_class="none", verdict="no-slo") == 1.0
    assert value(metrics, "requests_total", slo_class="chat", verdict="aborted") == 1.0
    assert value(metrics, "requests_total", slo_class="chat", verdict="error") == 1.0
    assert value(metrics, "step_fallback_total", kind="other") == 1.0
    assert value(metrics, "preemptions_total", kind="other") == 2.0


def test_measured_over_promised_and_predicted() -> None:
    metrics = SchedulerMetrics(["chat"], LABELS)
    metrics.request_done("chat", Verdict.ADMITTED, Kept(False, True, ttft_ratio=1.3, tpot_ratio=0.6))
    metrics.request_done("chat", Verdict.BEST_EFFORT, Kept(True, True))
    metrics.answered("chat", 30, 20.0)
    metrics.answered("chat", 30, 0.0)
    metrics.step_timed(0.012, 0.010)
    metrics.step_timed(0.012, 0.0)
    chat = {"slo_class": "chat", "verdict": "admitted"}
    assert value(metrics, "ttft_over_target_bucket", **chat, le="1.25") == 0.0
    assert value(metrics, "ttft_over_target_bucket", **chat, le="1.5") == 1.0
    assert value(metrics, "tpot_over_target_sum", **chat) == 0.6
    assert value(metrics, "ttft_over_target_count", slo_class="chat", verdict="best-effort") == 0.0
    assert value(metrics, "answer_over_forecast_sum", slo_class="chat") == 1.5
    assert value(metrics, "step_over_prediction_count") == 1.0
    assert value(metrics, "step_over_prediction_bucket", le="1.2") == 1.0
    assert value(metrics, "step_over_prediction_bucket", le="1.1") == 0.0


def test_steps_are_counted() -> None:
    metrics = SchedulerMetrics([], LABELS, CollectorRegistry())
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
    assert value(metrics, "queue_requests", queue="running", verdict="best-effort") == 0.0
    assert value(metrics, "batch_time_correction") == 1.23


WRITER = """
from slos_serve.core.verdict import Verdict
from slos_serve.vllm_plugin.metrics import EngineLabels, Kept, SchedulerMetrics
metrics = SchedulerMetrics(["chat"], EngineLabels("m", "1"))
metrics.request_done("chat", Verdict.ADMITTED, Kept(True, True))
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
    ours = 'engine="1",model_name="m"'
    assert f'slos_serve:attained_total{{{ours},slo_class="chat",verdict="admitted"}} 1.0' in done.stdout
    assert f'slos_serve:queue_requests{{{ours},queue="waiting",verdict="undecided"}} 4.0' in done.stdout
    assert f"slos_serve:plan_seconds_count{{{ours}}} 1.0" in done.stdout
