"""The plug-in's metrics (``slos_serve:*``) of all replicas on one page, ``/metrics`` of the endpoint.

An engine core writes its numbers into files of a folder of its replica, as it does beside a vLLM server. The replica
reads them when it is asked; the endpoint asks all replicas and adds the label ``replica``.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "slos_serve:"
LABEL = "replica"
ASK_EVERY_S, ASK_TIMEOUT_S = 0.5, 5.0


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

    async def page(self, handle: Any) -> bytes:
        """In Prometheus's text format.

        Args:
            handle: of the engine deployment.

        Raises:
            Exception: whatever Ray raises when a replica does not answer.
        """
        async with self._asking:
            if time.monotonic() - self._asked_s >= ASK_EVERY_S:
                answers = await handle.broadcast("plugin_metrics").results_async(timeout_s=ASK_TIMEOUT_S)
                self._page = await asyncio.to_thread(merged, answers)
                self._asked_s = time.monotonic()
        return self._page


class _Given:
    """A collector of metrics that are there already."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


def merged(answers: Iterable[tuple[str, str]]) -> bytes:
    """One page of several replicas' metrics, each labelled with its replica's name; others than the plug-in's left out.

    Args:
        answers: name and text of each replica.
    """
    found: dict[str, Metric] = {}
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
