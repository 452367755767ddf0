"""A real Prometheus, where it is installed, scrapes both processes' metrics: every panel and rule returns data."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from slos_serve.core.verdict import Verdict, Why
from slos_serve.launch.endpoint import free_port
from slos_serve.vllm_plugin.front.metrics import FrontMetrics
from slos_serve.vllm_plugin.metrics import EngineLabels, Kept, SchedulerMetrics

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 90.0
PROMETHEUS = shutil.which("prometheus")


class Traffic:
    """Requests that some engine ends, a few more at each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = SchedulerMetrics(["chat"], EngineLabels("m", "0"), self.registry)
        self.front = FrontMetrics(["chat"], EngineLabels("m", "0"), self.registry)

    def page(self) -> bytes:
        """What ``/metrics`` shows after some more requests."""
        engine, front = self.engine, self.front
        for ratio in (0.5, 0.9, 1.3):
            engine.request_done("chat", Verdict.ADMITTED, Kept(ratio < 1.0, True, ttft_ratio=ratio, tpot_ratio=0.8))
            engine.answered("chat", 30, 20.0)
            front.answered("chat", Verdict.ADMITTED, Why.FITS)
            front.compared(Verdict.ADMITTED, Verdict.ADMITTED)
            front.first_token(0.2, 0.21)
            engine.task_done("chat", Verdict.ADMITTED, kept=ratio < 1.0)
        engine.plan(0.0002)
        engine.step_timed(0.03, 0.029)
        engine.fallback("overrun")
        engine.held(1)
        engine.preempted("slo")
        engine.queue("running", 0, 3, 1)
        front.headroom("chat", 4, 900)
        front.kv(100, 40, 60)
        return generate_latest(self.registry)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if PROMETHEUS is None:
        pytest.skip("prometheus is not installed")
    traffic = Traffic()

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(traffic.page())

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    (folder / "prometheus.yml").write_text(
        f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{ROOT}/deploy/prometheus/slos-serve.rules.yml"]
scrape_configs: [{{job_name: vllm, static_configs: [{{targets: ["127.0.0.1:{server.server_port}"]}}]}}]
"""
    )
    command = [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        server.shutdown()
        server.server_close()


def rows(url: str, query: str) -> list[dict[str, object]]:
    """What a query returns once it returns something other than ``NaN``; empty when it does not in time."""
    until_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until_s:
        try:
            with urllib.request.urlopen(f"{url}/api/v1/query?query={urllib.parse.quote(query)}", timeout=10.0) as page:
                found: list[dict[str, object]] = json.loads(page.read())["data"]["result"]
        except OSError:
            found = []
        if any("NaN" not in str(row["value"]) for row in found):
            return found
        time.sleep(0.5)
    return []


def panels() -> list[str]:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "slos-serve.json").read_text(encoding="utf-8"))
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [query.replace("$__rate_interval", "15s").replace("$model", ".*") for query in found]


@pytest.mark.parametrize("query", panels())
def test_a_panel_returns_data(prometheus: str, query: str) -> None:
    assert rows(prometheus, query), query


@pytest.mark.parametrize(
    "name",
    [
        "slo_class:slos_serve_promises_kept:ratio_rate5m",
        "slo_class:slos_serve_attained:ratio_rate5m",
        "slo_class:slos_serve_promised:ratio_rate5m",
        "slos_serve_verdicts_agree:ratio_rate5m",
    ],
)
def test_a_recorded_rule_returns_data(prometheus: str, name: str) -> None:
    (row, *_) = rows(prometheus, name)
    assert 0.0 < float(row["value"][1]) <= 1.0  # type: ignore[index]  # Prometheus's pair of time and text


def test_promises_broken_on_purpose_raise_an_alert(prometheus: str) -> None:
    found = rows(prometheus, 'ALERTS{alertname="SlosServePromisesBroken"}')
    assert found and "chat" in str(found[0]["metric"])
