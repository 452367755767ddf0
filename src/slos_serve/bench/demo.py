"""The demo: the same seeded requests against stock vLLM and against vLLM with the plug-in, one after the other.

Both servers get the same model, arguments, environment, warm-up and requests; the plug-in is the only difference. Each
phase is over when its last answer has ended, so the burst begins on an idle engine and every late answer is scored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slos_serve.bench.client import ClientSettings, LoadClient
from slos_serve.bench.demo_events import read_events
from slos_serve.bench.demo_plan import DemoPlan
from slos_serve.bench.demo_report import SideRun, side_run
from slos_serve.bench.requests import BenchRequest, LoadResult, Response
from slos_serve.core.errors import SlosServeError
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.vllm_plugin.launch import Plugin, ServerProcess


class DemoFailedError(SlosServeError):
    """A side of the demo could not be run to its end; the message says where the server's log is."""


@dataclass(frozen=True)
class EngineSetup:
    """How both servers are started.

    Attributes:
        model: what vLLM loads.
        vllm_args: its arguments.
        environment: variables over those of this process.
        profile_path: the batch-time profile of this engine.
        profile_model: its coefficients, which slowdown SLOs are scaled with.
    """

    model: str
    vllm_args: Sequence[str]
    environment: Mapping[str, str]
    profile_path: Path
    profile_model: BatchTimeModel


@dataclass(frozen=True)
class Told:
    """Where progress goes.

    Attributes:
        starting: seconds waited for the server so far.
        phase: name of the phase that begins and its number of requests.
        answered: each answer of the phase.
    """

    starting: Callable[[float], None] = field(default=lambda _seconds: None)
    phase: Callable[[str, int], None] = field(default=lambda _name, _count: None)
    answered: Callable[[Response], None] = field(default=lambda _response: None)


def run_side(
    setup: EngineSetup, plan: DemoPlan, folder: Path, *, name: str, classes: Path | None, told: Told | None = None
) -> SideRun:
    """Start one server, send everything, stop it, score.

    Args:
        setup: the engine.
        plan: what is sent.
        folder: for the server's log and the scheduler's events; exists.
        name: of the side, for file names.
        classes: class file; starts the plug-in. ``None`` starts stock vLLM.
        told: where progress goes.

    Raises:
        ServerStartError: the server did not start.
        DemoFailedError: it died on the way.
    """
    events_path = folder / f"{name}-events.jsonl"
    events_path.unlink(missing_ok=True)
    log_path = folder / f"{name}-server.log"
    told = told or Told()
    server = ServerProcess(
        setup.model,
        setup.vllm_args,
        plugin=None if classes is None else Plugin(classes, setup.profile_path, events_path),
        environment=setup.environment,
        log_path=log_path,
        on_wait=told.starting,
    )
    with server:
        loads, phase_ends = asyncio.run(_send_all(server.base_url, plan, events_path, told))
    _check_alive(loads, log_path)
    events = None if classes is None else read_events(events_path, phase_ends)
    return side_run({"calm": loads["calm"], "burst": loads["burst"]}, plan, setup.profile_model, events)


async def _send_all(
    base_url: str, plan: DemoPlan, events_path: Path, told: Told
) -> tuple[dict[str, LoadResult], list[tuple[str, int]]]:
    """Results of each phase, and how large the event file was when each ended."""
    parts: dict[str, list[BenchRequest]] = {"warm": plan.warm_up, "calm": plan.calm, "burst": plan.burst}
    loads: dict[str, LoadResult] = {}
    phase_ends: list[tuple[str, int]] = []
    # Both sides are told the SLOs in the same headers; stock vLLM has no use for them.
    async with LoadClient(ClientSettings(base_url, slo_in="headers", timeout_s=300.0)) as client:
        for phase, requests in parts.items():
            told.phase(phase, len(requests))
            loads[phase] = await client.run(requests, told.answered)
            phase_ends.append((phase, events_path.stat().st_size if events_path.exists() else 0))
    return loads, phase_ends


def _check_alive(loads: Mapping[str, LoadResult], log_path: Path) -> None:
    """Refuse to score a server that was not there: a result of nothing but errors says nothing about scheduling."""
    for phase, load in loads.items():
        failed = [response for response in load.responses if response.status == 0]
        if failed:
            raise DemoFailedError(
                f"{len(failed)} of {len(load.responses)} requests of the {phase} phase got no answer "
                f"({failed[0].error}); the server probably died, see its log: {log_path}"
            )
