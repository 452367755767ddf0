"""The adapter's parts on vLLM's real scheduler: the base it takes, its start, its queues, its selections."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from slos_serve.core.errors import PlanMismatchError
from slos_serve.core.plan import StepPlan
from slos_serve.core.request import RequestTable
from slos_serve.testing.scheduler import Setup, make_scheduler
from slos_serve.vllm_plugin import compat, compat_kv, entry, self_test
from slos_serve.vllm_plugin import scheduler as scheduler_module
from slos_serve.vllm_plugin.config import PROFILE_ENV, PUBLISH_ENV
from slos_serve.vllm_plugin.engine_view import EngineLimits
from slos_serve.vllm_plugin.kv_needs import KVNeeds, _Group, _most_blocks
from slos_serve.vllm_plugin.scheduler import SLOScheduler, SLOSyncScheduler, Steered
from slos_serve.vllm_plugin.steering import SteeredStep, select
from tests.vllm.dry_load import Start, assert_answers, lengths, mixed_load, prompt


def test_the_base_is_the_one_vllm_would_use(start: Start) -> None:
    asynchronous = start(async_scheduling=True).scheduler
    synchronous = start(depth=1, async_scheduling=False).scheduler
    assert isinstance(asynchronous, AsyncScheduler)
    assert isinstance(synchronous, SLOSyncScheduler)
    assert not isinstance(synchronous, AsyncScheduler)


def test_the_planner_is_told_whether_steps_are_planned_ahead(start: Start) -> None:
    for scheduler, ahead in ((start().scheduler, True), (start(depth=1, async_scheduling=False).scheduler, False)):
        assert EngineLimits(scheduler).view(RequestTable(1), np.empty(0, int), np.empty(0, int)).plan_ahead is ahead


def test_pipeline_parallel_without_async_scheduling_is_vllms_own(start: Start, tmp_path: Path) -> None:
    scheduler = make_scheduler(SLOScheduler, tmp_path, pipeline_parallel_size=2, async_scheduling=False)
    assert type(scheduler) is Scheduler


def test_a_replica_that_could_not_plan_does_not_start(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PROFILE_ENV)
    monkeypatch.setenv(PUBLISH_ENV, f"ipc://{tmp_path}/publications")
    with pytest.raises(Exception, match="a replica must plan its steps"):
        start()


def armed(scheduler: Any) -> float:
    """What ``slos_serve:armed`` shows."""
    (found,) = [
        sample.value
        for family in scheduler._slo_metrics.registry.collect()
        for sample in family.samples
        if sample.name == "slos_serve:armed"
    ]
    return float(found)


def test_a_missing_name_leaves_stock_order(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_REQUEST_NAMES", (*compat._REQUEST_NAMES, "moved_in_a_later_release"))
    scheduler = start().scheduler
    assert scheduler._slo is None
    assert compat.missing_names(scheduler) == ["Request.moved_in_a_later_release"]
    assert armed(scheduler) == 0.0


def test_a_server_that_plans_nothing_starts_without_metrics_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("read-only")

    monkeypatch.delenv(PROFILE_ENV)
    monkeypatch.setattr(scheduler_module, "SchedulerMetrics", fail)
    engine = start()
    mixed_load(engine, count=6)
    assert_answers(engine)


def test_a_dry_plan_that_fails_leaves_stock_order(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AttributeError("moved")

    assert armed(start().scheduler) == 1.0
    monkeypatch.setattr(self_test, "select", fail)
    engine = start()
    assert engine.scheduler._slo is None
    assert armed(engine.scheduler) == 0.0, "nobody could be alerted"
    mixed_load(engine, count=6)
    assert_answers(engine)


def test_the_dry_plan_leaves_nothing_behind(start: Start) -> None:
    scheduler = start().scheduler
    assert not scheduler._slo.book.by_id
    assert len(scheduler.waiting) == len(scheduler.running) == len(scheduler.requests) == 0


@pytest.mark.parametrize("version", ["0.34.0", "1.0.0"])
def test_a_newer_vllm_with_every_name_is_steered(start: Start, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    told: list[str] = []
    monkeypatch.setattr(scheduler_module.logger, "warning", lambda text, *parts: told.append(text % parts))
    monkeypatch.setenv("SLOS_SERVE_ALLOW_PROFILE_MISMATCH", "1")
    monkeypatch.setattr(compat, "engine_version", lambda: version)
    assert start().scheduler._slo is not None
    assert any(f"vLLM {version} is outside the tested range" in text for text in told)


def test_versions_are_read() -> None:
    assert compat.version_of("0.32.0+cpu") == (0, 32)
    assert compat.version_of("dev") == (0, 0)


def test_the_queues_are_scanned_after_stock_steps_only(start: Start) -> None:
    engine = start()
    mixed_load(engine, count=60)
    control = engine.scheduler._slo
    assert engine.num_steps > 200
    assert control.queues.scans < 40
    assert len(control.queues) == 0


def test_the_queues_agree_with_vllm_at_every_step(start: Start) -> None:
    engine = start(num_blocks=600)
    control, rng = engine.scheduler._slo, np.random.default_rng(3)
    for number in range(50):
        lengths[f"q{number}"] = (prompt(rng, int(rng.integers(20, 900))), int(rng.integers(5, 60)))
        engine.add(f"q{number}", *lengths[f"q{number}"], {"slo_class": ("chat", "code")[number % 2]})
    for number in range(300):
        if number % 9 == 0:
            engine.abort(f"q{number // 9}")
        engine.step()
        control.queues.look()
        waiting = [*getattr(engine.scheduler, compat.first_queue_name(engine.scheduler)), *engine.scheduler.waiting]
        known = {**control.queues.startable, **control.queues.blocked}
        seen = {tracked.request.request_id for tracked in known.values()}
        assert seen == {request.request_id for request in waiting}


def test_a_plan_beyond_the_limits_is_cut_to_them(start: Start) -> None:
    engine = start(max_num_seqs=2, max_num_batched_tokens=256)
    rng = np.random.default_rng(4)
    for number in range(5):
        engine.add(f"w{number}", prompt(rng, 100), 5, {"slo_class": "chat"})
    control = engine.scheduler._slo
    view = control.look(0.0)
    plan = StepPlan(slots=view.waiting, tokens=np.full(5, 100), reasons=np.zeros(5, dtype=np.int64))
    chosen = select(engine.scheduler, plan, control.book, control.limits.needs, ())
    assert len(chosen.start) == 2  # two slots, and 200 of 256 tokens
    assert chosen.budget == 200


def test_a_plan_with_a_slot_that_is_empty_changes_nothing(start: Start) -> None:
    engine = start()
    engine.add("only", [5, 6, 7], 5, {"slo_class": "chat"})
    control = engine.scheduler._slo
    control.look(0.0)
    plan = StepPlan(slots=np.array([17]), tokens=np.array([1]), reasons=np.array([0]))
    with pytest.raises(PlanMismatchError):
        select(engine.scheduler, plan, control.book, control.limits.needs, ())
    assert len(engine.scheduler.waiting) == 1


def test_steering_puts_everything_back_when_vllm_raises(start: Start) -> None:
    engine = start()
    rng = np.random.default_rng(5)
    for number in range(4):
        engine.add(f"s{number}", prompt(rng, 50), 30, {"slo_class": "chat"})
    for _ in range(4):
        engine.step()
    engine.add("late", prompt(rng, 50), 5, {"slo_class": "chat"})
    scheduler, control = engine.scheduler, engine.scheduler._slo
    view = control.look(engine.now_s)
    plan = control.policy.plan(engine.now_s, view)
    chosen = select(scheduler, plan, control.book, control.limits.needs, ())
    before = (list(scheduler.running), list(scheduler.waiting), scheduler.max_num_scheduled_tokens)
    with pytest.raises(RuntimeError), SteeredStep(scheduler, chosen, 0.0, control.hidden, control.guard.fault):
        raise RuntimeError("inside vLLM")
    assert (list(scheduler.running), list(scheduler.waiting), scheduler.max_num_scheduled_tokens) == before
    assert control.hidden.running == control.hidden.waiting == 0


def test_kv_needs_of_one_group(start: Start) -> None:
    scheduler = start(num_blocks=1000).scheduler
    needs = KVNeeds(scheduler)
    assert (needs.block_size, needs.pool_blocks_each) == (16, 1.0)
    assert needs.total_blocks() == needs.free_blocks() == 999
    assert needs.fixed_blocks(10_000) == 0


def test_kv_needs_of_a_sliding_window_stop_growing() -> None:
    class SlidingWindowSpec:
        sliding_window = 128

    class MambaSpec:
        num_speculative_blocks = 3

    class FullAttentionSpec:
        sliding_window = None

    assert _most_blocks(SlidingWindowSpec(), 16, 512) == -(-(127 + 512) // 16) + 1
    assert _most_blocks(MambaSpec(), 16, 512) == 5
    assert _most_blocks(FullAttentionSpec(), 16, 512) is None
    needs = KVNeeds.__new__(KVNeeds)
    needs._fixed, needs.pool_blocks_each = [_Group(16, 41, 9)], 1.0
    assert (needs.fixed_blocks(160), needs.fixed_blocks(100_000)) == (10, 41)
    assert (needs.decode_blocks(80), needs.decode_blocks(100_000)) == (5, 9)


def test_a_decode_is_charged_its_window_not_a_chunk_beside_it(start: Start) -> None:
    engine = start(num_blocks=2000, setup=Setup(kv_groups=("full", "sliding")))
    rng = np.random.default_rng(3)
    for number, slo in enumerate(({"slo_class": "chat"}, None)):
        engine.add(f"r{number}", prompt(rng, 1500), 60, slo)
    scheduler, control = engine.scheduler, engine.scheduler._slo
    first = control.book.by_id["r0"]
    assert control.book.table.rows["fixed_blocks"][first.slot] == first.fixed_blocks > 90
    while any(len(answer) < 6 for answer in engine.answers.values()):
        engine.step()
    control.look(engine.now_s)
    windows = scheduler.kv_cache_manager.coordinator.single_type_managers[1]
    for name, tracked in control.book.by_id.items():
        held = sum(not block.is_null for block in windows.req_to_blocks[name])
        assert held <= control.book.table.rows["fixed_blocks"][tracked.slot] <= held + 2


def test_prefix_hits_are_found_by_bisection(start: Start) -> None:
    engine = start()
    rng = np.random.default_rng(7)
    shared = prompt(rng, 1600)
    engine.add("first", [*shared, 7], 400, {"slo_class": "chat"})
    for _ in range(4):
        engine.step()
    for tail in (0, 5, 333, 1599):
        name = f"tail{tail}"
        engine.add(name, [*shared[: 1600 - tail], *prompt(rng, 50)], 2, {"slo_class": "chat"})
        request = engine.scheduler.requests[name]
        hit = engine.scheduler.kv_cache_manager.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        cached, in_use = compat_kv.LocalHits(engine.scheduler).find(request)
        assert cached == hit[1]
        assert in_use == cached  # the first request runs and holds these blocks


def test_unknown_requests_do_not_disturb(start: Start) -> None:
    """A request that could not be entered is served by vLLM's own rules."""
    engine = start()
    desk = engine.scheduler._slo_desk
    entered = desk.entered

    def refuse(_: Any) -> None:
        raise ValueError("odd")

    desk.entered = refuse
    lengths["odd"] = ([5, 6, 7, 8], 6)
    engine.add("odd", *lengths["odd"])
    desk.entered = entered
    mixed_load(engine, count=10)
    assert_answers(engine)
    assert engine.scheduler._slo.guard.counts.get("enter") == 1


def test_finish_kinds() -> None:
    reasons = {"stop": "stop", "length": "length", "repetition": "repetition"}
    for name, kind in reasons.items():
        assert compat.finish_kind(SimpleNamespace(get_finished_reason=lambda name=name: name)) == kind
    assert compat.finish_kind(SimpleNamespace(get_finished_reason=lambda: None)) == "error"


def test_every_class_here_is_steered() -> None:
    assert issubclass(SLOScheduler, Steered)
    assert issubclass(SLOSyncScheduler, Steered)


def test_a_slot_that_is_used_again_belongs_to_a_waiting_request(start: Start) -> None:
    engine = start()
    for number in range(4):  # one after the other, so that nobody runs between them
        lengths[f"one{number}"] = ([5, 6, 7, number], 5)
        engine.add(f"one{number}", *lengths[f"one{number}"], {"slo_class": "chat"})
        engine.run()
    assert_answers(engine)
    assert engine.scheduler._slo.guard.counts == {}


def test_a_hiccup_between_two_clocks_does_not_change_the_order_of_arrivals(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal promises are due in the order in which the front end stamped their requests."""
    engine = start()
    delays = itertools.cycle((0.002, 0.0, 0.001))

    def slow_time() -> float:
        """The wall clock, after which the thread loses its core for a while."""
        now_at = engine.now_s
        engine.now_s += next(delays)
        return now_at

    monkeypatch.setattr(entry, "time", SimpleNamespace(time=slow_time))
    arrivals = [engine.scheduler._slo_desk._arrival_s(engine.now_s - 0.5 + number * 1e-5) for number in range(9)]
    assert arrivals == sorted(arrivals)
    earlier_s = engine.scheduler._slo_desk._arrival_s(engine.now_s - 10.0)
    assert earlier_s < arrivals[0] - 9.0, "one that came before them is due before them"


def test_vllms_look_at_every_module_passes_llvmlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """``scheduler_cls=SLOScheduler``: numba is loaded before the CPU engine looks for kernels in all modules."""
    dispatcher = pytest.importorskip("vllm.triton_utils.dispatcher")
    modules = {name: module for name, module in sys.modules.items() if name.startswith("llvmlite")}
    assert "llvmlite.binding.ffi" in modules
    monkeypatch.setattr(dispatcher, "sys", SimpleNamespace(modules=modules))
    dispatcher._rebind_kernels([(object(), object())])
    assert modules["llvmlite.binding.ffi"].lib.LLVMPY_GetVersionInfo() > 0


def test_a_router_learns_that_its_request_has_come(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PUBLISH_ENV, f"ipc://{tmp_path}/publications")
    monkeypatch.setattr(scheduler_module, "end_with_parent", lambda: None)
    engine = start()
    named = engine.scheduler._slo.publisher._tickets
    for number, extra in enumerate(({"slo_ticket": 5, "slo_class": "chat"}, {"slo_ticket": 6}, None)):
        lengths[f"r{number}"] = ([number] * 20, 3)
        engine.add(f"r{number}", *lengths[f"r{number}"], extra)
    assert [ticket for _, ticket in named] == [5, 6]
    engine.run()
    assert_answers(engine)
