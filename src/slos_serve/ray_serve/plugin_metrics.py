"""The plug-in's metrics (``slos_serve:*``) of all replicas on one page, ``/metrics`` of the endpoint.

An engine core writes its numbers into files of a folder of its replica, as it does beside a vLLM server. The replica
reads them when it is asked; the endpoint asks all replicas and adds the label ``replica``. The page has those that
answer, and ``slos_serve:replica_silent`` says which do not.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from slos_serve.ray_serve import compat

PREFIX = "slos_serve:"
LABEL = "replica"
# Prometheus gives up after ten seconds.
ASK_EVERY_S, ASK_TIMEOUT_S = 0.5, 3.0
SILENT = "slos_serve:replica_silent"
UNKNOWN = "unknown"


class ReplicaMetrics:
    """What one replica's engine counts; ``folder`` is where its engine core writes."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="slos-serve-metrics-")
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def text(self) -> str:
        """In Prometheus's text format; empty while nothing was written."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=self.folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry).decode("utf-8")


class FleetMetrics:
    """The page: replicas are asked twice a second at most, however many look at it."""

    def __init__(self) -> None:
        self._asking = asyncio.Lock()
        self._page = b""
        self._asked_s = -float("inf")
        self._names: list[str] = []

    async def page(self, handle: Any) -> bytes:
        """In Prometheus's text format.

        Args:
            handle: of the engine deployment.

        Raises:
            Exception: whatever Ray raises when there is no replica.
            TimeoutError: none answered.
        """
        async with self._asking:
            if time.monotonic() - self._asked_s >= ASK_EVERY_S:
                answers, silent = await compat.answers_of(handle.broadcast("plugin_metrics"), ASK_TIMEOUT_S)
                if not answers:
                    raise TimeoutError(f"none of {silent} replicas answered")
                self._page = await asyncio.to_thread(merged, answers, self._silent_names(answers, silent))
                self._asked_s = time.monotonic()
        return self._page

    def _silent_names(self, answers: Sequence[tuple[str, str]], silent: int) -> list[str]:
        """Who did not answer: those that answered before, the latest first; one that never did is ``unknown``."""
        spoke = [name for name, _ in answers]
        missing = [name for name in self._names if name not in spoke][:silent]
        self._names = [*spoke, *missing]
        return [*missing, *[UNKNOWN] * (silent > len(missing))]


class _Given:
    """A collector of metrics that are there already."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


def merged(answers: Sequence[tuple[str, str]], silent: Sequence[str] = ()) -> bytes:
    """One page of several replicas' metrics, each labelled with its replica's name; others than the plug-in's left out.

    Args:
        answers: name and text of each replica.
        silent: names of replicas that did not answer.
    """
    heard = GaugeMetricFamily(SILENT, "1 for a replica that did not answer in time.", labels=[LABEL])
    for name in [*(name for name, _ in answers), *silent]:
        heard.add_metric([name], float(name in silent))
    found: dict[str, Metric] = {SILENT: heard}
    for replica, text in answers:
        for family in text_string_to_metric_families(text):
            if not family.name.startswith(PREFIX):
                continue
            metric = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                metric.add_sample(sample.name, {**sample.labels, LABEL: replica}, sample.value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(list(found.values())))
    return generate_latest(registry)
