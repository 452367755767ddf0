"""The scheduler without metrics, events and live page: the other side of ``benchmarks.telling``."""

from __future__ import annotations

from typing import Any

from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.scheduler import SLOScheduler


class QuietScheduler(SLOScheduler):
    """Plans as :class:`SLOScheduler` does and hands nothing to the telemetry thread."""

    def _slo_start(self, settings: PluginConfig) -> None:
        super()._slo_start(settings)
        if self._slo is not None:
            self._slo.telemetry.post = _nothing  # type: ignore[method-assign]


def _nothing(*_given: Any, **_named: Any) -> None:
    """Take a call of the telemetry and leave it."""
