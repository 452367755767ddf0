"""The demo: the same seeded requests against stock vLLM and against vLLM with the plug-in, by turns.

Both servers get the same model, arguments, environment, warm-up and requests; the plug-in is the only difference. Both
are up all the time and one works while the other idles. Each turn is over when its last answer has ended, so that every
turn begins on idle engines and every late answer is scored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from slos_serve.bench.client import ClientSettings, LoadClient
from slos_serve.bench.demo_events import read_events
from slos_serve.bench.demo_plan import DemoPlan
from slos_serve.bench.demo_report import OURS, PHASES, STOCK, SideRun, side_run
from slos_serve.bench.requests import BenchRequest, LoadResult, Response
from slos_serve.core.errors import SlosServeError
from slos_serve.launch.server import Patience, ServerProcess
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.vllm_plugin.config import PluginConfig

EVENTS = f"{OURS}-events.jsonl"


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
        starting: seconds waited for the servers so far.
        phase: side and phase whose turn begins and its number of requests.
        answered: each answer of the turn.
    """

    starting: Callable[[float], None] = field(default=lambda _seconds: None)
    phase: Callable[[str, str, int], None] = field(default=lambda _side, _name, _count: None)
    answered: Callable[[Response], None] = field(default=lambda _response: None)


def run_sides(
    setup: EngineSetup, plan: DemoPlan, folder: Path, *, classes: Path, told: Told | None = None
) -> dict[str, SideRun]:
    """Start both servers, send everything to each, stop them, score; see :func:`send_to_both`."""
    loads, phase_ends = send_to_both(setup, plan, folder, classes=classes, told=told)
    events = {OURS: read_events(folder / EVENTS, phase_ends), STOCK: None}
    return {side: side_run(parts, plan, setup.profile_model, events[side]) for side, parts in loads.items()}


def send_to_both(
    setup: EngineSetup, plan: DemoPlan, folder: Path, *, classes: Path, told: Told | None = None
) -> tuple[dict[str, dict[str, LoadResult]], list[tuple[str, int]]]:
    """Start both servers, send everything to each, stop them.

    Returns:
        Results by side and phase, and where in the event file each part of ours ended.

    Args:
        setup: the engine.
        plan: what is sent.
        folder: for the servers' logs and the scheduler's events; exists.
        classes: class file of the server with the plug-in.
        told: where progress goes.

    Raises:
        ServerStartError: a server did not start.
        DemoFailedError: one died on the way.
    """
    told = told or Told()
    events_path = folder / EVENTS
    events_path.unlink(missing_ok=True)
    ours = PluginConfig(classes_path=classes, profile_path=setup.profile_path, events_path=events_path)
    servers = {
        side: ServerProcess(
            setup.model,
            setup.vllm_args,
            plugin=plugin,
            environment=setup.environment,
            output=folder / f"{side}-server.log",
            patience=Patience(on_wait=told.starting),
        )
        for side, plugin in ((STOCK, None), (OURS, ours))
    }
    with all_ready(servers):
        urls = {side: server.base_url for side, server in servers.items()}
        loads, phase_ends = asyncio.run(_send_all(urls, plan, events_path, told))
    for side, parts in loads.items():
        _check_alive(parts, folder / f"{side}-server.log")
    return {side: {phase: parts[phase] for phase in PHASES} for side, parts in loads.items()}, phase_ends


@contextmanager
def all_ready(servers: Mapping[str, ServerProcess]) -> Iterator[None]:
    """Start the servers side by side; an idle one costs the other next to nothing."""
    with ExitStack() as stack:
        for server in servers.values():
            stack.callback(server.stop)
            server.start()
        for server in servers.values():
            server.wait_ready()
        yield


async def _send_all(
    urls: Mapping[str, str], plan: DemoPlan, events_path: Path, told: Told
) -> tuple[dict[str, dict[str, LoadResult]], list[tuple[str, int]]]:
    """Results by side and phase, and how large the event file was when each part of ours ended."""
    loads: dict[str, dict[str, LoadResult]] = {side: {} for side in urls}
    phase_ends: list[tuple[str, int]] = []
    async with AsyncExitStack() as stack:
        # Both sides are told the SLOs in the same headers; stock vLLM has no use for them.
        clients = {
            side: await stack.enter_async_context(LoadClient(ClientSettings(url, slo_in="headers", timeout_s=300.0)))
            for side, url in urls.items()
        }
        for side, phase, requests in turns(plan):
            told.phase(side, phase, len(requests))
            load = await clients[side].run(requests, told.answered)
            earlier = loads[side].get(phase)
            loads[side][phase] = load if earlier is None else earlier.then(load)
            if side == OURS:
                phase_ends.append((phase, events_path.stat().st_size if events_path.exists() else 0))
    return loads, phase_ends


def turns(plan: DemoPlan) -> list[tuple[str, str, list[BenchRequest]]]:
    """Whose turn it is, in which phase, with which requests: one server works at a time.

    A machine that is shared drifts within minutes, so the calm phase, whose differences are small, goes back and forth.
    """
    order = [(STOCK, "warm", plan.warm_up), (OURS, "warm", plan.warm_up)]
    for number, part in enumerate(plan.calm_parts):
        pair = (STOCK, OURS) if number % 2 == 0 else (OURS, STOCK)
        order += [(side, "calm", part) for side in pair]
    return [*order, (STOCK, "burst", plan.burst), (OURS, "burst", plan.burst)]


def _check_alive(loads: Mapping[str, LoadResult], log_path: Path) -> None:
    """Refuse to score a server that was not there: a result of nothing but errors says nothing about scheduling."""
    for phase, load in loads.items():
        failed = [response for response in load.responses if response.status == 0]
        if failed:
            raise DemoFailedError(
                f"{len(failed)} of {len(load.responses)} requests of the {phase} phase got no answer "
                f"({failed[0].error}); the server probably died, see its log: {log_path}"
            )
