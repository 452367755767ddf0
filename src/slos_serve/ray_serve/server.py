"""The engine deployment: Ray Serve LLM's server, whose engine publishes and whose silence is noticed."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from slos_serve.files.class_file import CUSTOM_CLASS
from slos_serve.ray_serve.compat import ClusterStore
from slos_serve.ray_serve.curve import shared_keys
from slos_serve.ray_serve.engine import SLOEngine
from slos_serve.ray_serve.live import ReplicaLive
from slos_serve.ray_serve.plugin_metrics import ReplicaMetrics
from slos_serve.ray_serve.ports import DEFAULT_PORTS, PORTS_ENV, PortRange
from slos_serve.ray_serve.pulse import Pulse
from slos_serve.ray_serve.relay import Relay
from slos_serve.ray_serve.replica_gauges import ReplicaGauges, least_headroom
from slos_serve.ray_serve.ticket import Ticket
from slos_serve.ray_serve.wire import ADDRESS_KEY
from slos_serve.routing.demand import Demand
from slos_serve.routing.headroom import room_of
from slos_serve.vllm_plugin.config import EVENTS_ENV, PUBLISH_ENV, PluginConfig
from slos_serve.vllm_plugin.handed import with_told
from slos_serve.vllm_plugin.metrics import MULTIPROC_ENV

HANG_ENV = "SLOS_SERVE_HANG_AFTER_S"
HANG_AFTER_S = 60.0
METRICS_EVERY_S = 2.0
_logger = logging.getLogger("slos_serve.ray_serve")


class SLOServer(LLMServer):
    """One replica: vLLM with :class:`slos_serve.vllm_plugin.SLOScheduler`, its state published to routers."""

    async def __init__(self, llm_config: LLMConfig, **options: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        settings = PluginConfig.from_environment(os.environ)
        self._pulse = Pulse()
        self._relay = Relay(
            ray.util.get_node_ip_address(),
            self._pulse,
            shared_keys(ClusterStore()),
            PortRange.of_text(os.environ.get(PORTS_ENV, DEFAULT_PORTS)),
            settings.publish_every_s,
        )
        self._hang_after_s = float(os.environ.get(HANG_ENV, HANG_AFTER_S))
        self._demand = Demand()
        self._live = ReplicaLive() if settings.live_page else None
        self._plugin_metrics = ReplicaMetrics()
        # vLLM starts its engine core with this process's environment.
        os.environ[MULTIPROC_ENV] = self._plugin_metrics.folder
        os.environ[PUBLISH_ENV] = self._relay.engine_address
        if settings.events_path is not None:
            os.environ[EVENTS_ENV] = str(_own_file(settings.events_path))
        await super().__init__(llm_config, **{"engine_cls": SLOEngine, **options})
        self._metrics = asyncio.create_task(self._report())

    async def chat(self, request: Any, raw_request_info: Any = None, ticket: Ticket | None = None) -> Any:
        """Run a chat request."""
        _hand_over(request, ticket)
        return self._watched(await super().chat(request, raw_request_info), ticket)

    async def completions(self, request: Any, raw_request_info: Any = None, ticket: Ticket | None = None) -> Any:
        """Run a completion request."""
        _hand_over(request, ticket)
        return self._watched(await super().completions(request, raw_request_info), ticket)

    async def check_health(self) -> None:
        """Raise when the engine is dead, so that Ray replaces the replica; end this process when the engine hangs.

        Ray would let a replica that says it is unhealthy finish its requests first, which a hanging engine never does.
        """
        await super().check_health()
        silent_s = self._pulse.silent_s(time.monotonic())
        if silent_s > self._hang_after_s:
            _logger.critical("%d requests wait and no step came for %.0f s", self._pulse.num_calls, silent_s)
            end_this_replica()

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Where routers hear what this replica publishes."""
        return {ADDRESS_KEY: self._relay.address}

    async def live_state(self) -> dict[str, Any] | None:
        """What the live page shows of this replica; ``None`` without a page."""
        live = self._live
        if live is None:
            return None
        name = serve.get_replica_context().replica_id.unique_id
        return await asyncio.to_thread(lambda: live.told(name, self._relay.latest()))

    async def plugin_metrics(self) -> tuple[str, str]:
        """This replica's name and what its engine counts, for the endpoint's ``/metrics``."""
        name = serve.get_replica_context().replica_id.unique_id
        return name, await asyncio.to_thread(self._plugin_metrics.text)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What :func:`slos_serve.ray_serve.autoscaling.headroom_policy` scales on, and headroom by class."""
        return await asyncio.to_thread(self._demand.stats, self._relay.latest(), time.monotonic())

    async def _report(self) -> None:
        """Set the metrics anew, for as long as the replica lives."""
        gauges = ReplicaGauges()
        while True:
            await asyncio.sleep(METRICS_EVERY_S)
            try:
                stats, latest, room = await self.record_autoscaling_stats(), self._relay.latest(), None
                if latest is not None:
                    room = await asyncio.to_thread(room_of, latest, least_headroom(stats), time.monotonic())
                    self._relay.tell_room(room)
                gauges.set(stats, room, self._relay.refused_peers)
            except Exception:
                _logger.exception("slos-serve: headroom cannot be told")

    async def _watched(self, answer: Any, ticket: Ticket | None) -> AsyncGenerator[Any, None]:
        now_s = time.monotonic()
        number = self._pulse.call_began(now_s)
        if ticket is not None:
            self._demand.began(number, ticket.given, ticket.slo_class or CUSTOM_CLASS, not ticket.is_unpromised, now_s)
        try:
            async for part in answer:
                yield part
        finally:
            self._pulse.call_ended(number)
            self._demand.ended(number)


def _hand_over(request: Any, ticket: Ticket | None) -> None:
    """Tell the engine that the client was told a promise, which binds it; not where another replica was to keep it."""
    rank = None if ticket is None else ticket.told_at(serve.get_replica_context().replica_id.unique_id)
    request.vllm_xargs = with_told(getattr(request, "vllm_xargs", None), rank)


def end_this_replica() -> None:
    """End at once, the engine first: what waits here is routed again, and its memory is free for the next replica."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def _own_file(path: Path) -> Path:
    """``events.jsonl`` -> ``events-REPLICA.jsonl``: each replica appends to a file of its own."""
    return path.with_name(f"{path.stem}-{serve.get_replica_context().replica_id.unique_id}{path.suffix}")
