"""Play a random episode on stock and on ours, and say what of ours is wrong.

Wrong is: an exception, a fault of the plug-in, a row that says other than vLLM's counters, a request that never ends,
KV blocks that are not free at the end, an answer other than stock's, a fault on the device that stock has not, and no
progress for longer than stock's worst case plus the planner's ``aging_s``.

Two ends are vLLM's own, on either side, and counted on both. Streaming-input sessions hold all KV between two turns,
none of them can go on, and vLLM cannot take KV from a session that waits. And a step in vLLM's own order starts a
request with one LoRA adapter too many, since it counts only the running requests that it schedules, not one that waits
for its image; when all are scheduled, its assertion ends the engine.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slos_serve.planning.settings import PlannerSettings
from slos_serve.testing.dry_engine import DryEngine
from slos_serve.testing.scheduler import make_scheduler, stock_class
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.scheduler import SLOScheduler
from tests.builders import OPT_13B_A100
from tests.vllm.episodes import STEPS, Episode, episode_of
from tests.vllm.feature_probes import SOFT_KINDS, counts_of
from tests.vllm.progress_check import check_rows

MOST_STEPS = 6000
# Steps in vLLM's own order after which an engine that makes nothing is locked.
OWN_STEPS = 50


@dataclass
class Run:
    """What became of an episode on one scheduler."""

    error: str = ""
    trace: str = ""
    answers: dict[str, list[int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    locked: bool = False
    overfull: bool = False
    orphaned: bool = False
    worst_wait_s: float = 0.0
    cpu_s: float = 0.0


def run_episode(episode: Episode, folder: Path, cls: type[Any] | None = None) -> Run:
    """Play an episode to its end; stock when no class is given."""
    run = Run()
    if cls is None:
        cls = stock_class(async_scheduling=episode.arguments["async_scheduling"])
    scheduler = make_scheduler(cls, folder, setup=episode.setup, **episode.arguments)
    engine = DryEngine(scheduler, OPT_13B_A100, depth=None)
    scheduler.slo_clock_s = lambda: engine.now_s
    check_rows(scheduler)
    overfull, cut_short = _watch_adapters(scheduler), _watch_sessions(scheduler)
    entered: dict[str, float] = {}
    start_s = time.process_time()
    try:
        for step in range(max(STEPS, max(episode.events, default=0) + 1)):
            for event in episode.events.get(step, ()):
                before = set(engine.answers)
                event(engine)
                entered |= dict.fromkeys(set(engine.answers) - before, engine.now_s)
            engine.step(throttle_prefills=step in episode.throttled)
        engine.run(MOST_STEPS)
        run.error = _left_behind(engine, episode)
        run.locked = bool(scheduler.requests) and _is_locked(engine)
        run.orphaned = _are_orphans(scheduler, cut_short)
    except Exception as error:  # whatever the scheduler does is what is looked for
        run.error = f"{type(error).__name__}: {error}"[:300]
        run.trace = traceback.format_exc(limit=-4)
    run.cpu_s = time.process_time() - start_s
    run.overfull = overfull[0] and run.error.startswith("AssertionError")
    run.answers, run.faults, run.counts = engine.answers, engine.faults, counts_of(scheduler)
    run.steps = engine.all_steps
    run.worst_wait_s = max(
        (_worst_wait(engine, name, entered[name]) for name in episode.sure if name in entered), default=0.0
    )
    scheduler.shutdown()
    return run


def _left_behind(engine: DryEngine, episode: Episode) -> str:
    scheduler = engine.scheduler
    unfinished = sorted(scheduler.requests)
    if scheduler.has_unfinished_requests() or unfinished:
        return f"never finished: {unfinished[:5]}"
    missing = sorted(name for name in episode.sure if name not in engine.finished)
    if missing:
        return f"no end came for {missing[:5]}"
    if scheduler.kv_cache_manager.usage > 0.0:
        return "KV blocks were not freed"
    return ""


def _watch_adapters(scheduler: Any) -> list[bool]:
    """A list whose one entry becomes true when a step in vLLM's own order lets too many LoRA adapters run."""
    seen, most, schedule = [False], compat.most_adapters(scheduler), scheduler.schedule
    control = getattr(scheduler, "_slo", None)

    def num_adapters() -> int:
        return len({compat.adapter_of(request) for request in scheduler.running} - {0})

    def watched(*args: Any, **kwargs: Any) -> Any:
        before, plans = num_adapters(), 0 if control is None else control.policy.planner.counters.plans
        output = schedule(*args, **kwargs)
        is_own = control is None or control.policy.planner.counters.plans == plans
        seen[0] = seen[0] or (is_own and before <= most < num_adapters())
        return output

    if most:
        scheduler.schedule = watched
    return seen


def _watch_sessions(scheduler: Any) -> set[str]:
    """Sessions that vLLM's own step preempted while output of theirs was in flight; the plug-in's plans never do."""
    seen: set[str] = set()
    preempt = scheduler._preempt_request

    def watched(request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.resumable and request.num_output_placeholders:
            seen.add(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = watched
    return seen


def _are_orphans(scheduler: Any, cut_short: set[str]) -> bool:
    """Whether all that is left are such sessions, in none of vLLM's lists: the end of their turn took them out."""
    lists = (scheduler.running, scheduler.waiting, getattr(scheduler, compat.first_queue_name(scheduler)))
    listed = {request.request_id for several in lists for request in several}
    return bool(scheduler.requests) and set(scheduler.requests) <= cut_short - listed


def _is_locked(engine: DryEngine) -> bool:
    """Whether vLLM's own order makes nothing more: nobody runs, and sessions that wait for a turn hold KV."""
    scheduler = engine.scheduler
    control = getattr(scheduler, "_slo", None)
    if control is not None:
        control.guard.armed = False
    if sum(engine.step() for _ in range(OWN_STEPS)) or scheduler.running:
        return False
    waiting = (*getattr(scheduler, compat.first_queue_name(scheduler)), *scheduler.waiting)
    return any(compat.holds_slot(request) for request in waiting)


def _worst_wait(engine: DryEngine, name: str, entered_s: float) -> float:
    times = [entered_s, *engine.token_times_s[name]]
    return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


def judged(episode: Episode, stock: Run, ours: Run) -> str:
    """What is wrong with ours, empty when nothing is."""
    is_vllms = ours.locked or ours.overfull or ours.orphaned
    if ours.error and not is_vllms:
        return ours.error
    hard = {kind: count for kind, count in ours.counts.items() if kind not in SOFT_KINDS}
    if hard:
        return f"faults of the plug-in: {hard}"
    if is_vllms:
        return ""
    if ours.faults and not stock.faults:
        return ours.faults[0]
    for name, answer in stock.answers.items():
        mine = ours.answers.get(name, [])
        both = None if name in episode.sure else min(len(answer), len(mine))
        if answer[:both] != mine[:both]:
            return f"{name} answers otherwise than on stock ({len(mine)} and {len(answer)} tokens)"
    limit_s = stock.worst_wait_s + PlannerSettings().aging_s
    if ours.worst_wait_s > limit_s:
        return f"a request made no progress for {ours.worst_wait_s:.1f} s, on stock {stock.worst_wait_s:.1f} s"
    return ""


@dataclass
class Verdict:
    """One seed."""

    problem: str
    stock: Run
    ours: Run


def try_seed(seed: int, folder: Path, without: Collection[str] = (), most_requests: int = 26) -> Verdict:
    """Play a seed on both; an episode that fails on stock as well is vLLM's."""
    episode = episode_of(seed, without, most_requests)
    stock = run_episode(episode_of(seed, without, most_requests), folder)
    ours = run_episode(episode, folder, SLOScheduler)
    return Verdict("" if stock.error else judged(episode, stock, ours), stock, ours)


def shrink(seed: int, folder: Path) -> tuple[list[str], int, str]:
    """Smallest feature set (and number of requests) that a failing seed still fails with, and how it fails."""
    features = sorted(episode_of(seed).features)
    without: list[str] = []
    problem = try_seed(seed, folder).problem
    for name in features:
        found = try_seed(seed, folder, [*without, name]).problem
        if found:
            without.append(name)
            problem = found
    most = 26
    while most > 1:
        found = try_seed(seed, folder, without, most // 2).problem
        if not found:
            break
        most, problem = most // 2, found
    return sorted(episode_of(seed, without).features), most, problem
