"""``--scheduler-cls slos_serve.vllm_plugin.SLOScheduler``: vLLM's own scheduler, steered step by step.

The class names what vLLM calls and hands each call to our code through the guard: whatever happens there, vLLM's own
code runs with its lists as it left them. :mod:`slos_serve.vllm_plugin.controller` makes a step,
:mod:`slos_serve.vllm_plugin.entry` enters and judges requests. While no request carries a promise nothing is planned.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from slos_serve.core.errors import UnsupportedEngineError
from slos_serve.core.request import MAX_DRAFT_TOKENS
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.vllm_plugin import capabilities, compat, compat_kv
from slos_serve.vllm_plugin.config import PROFILE_ENV, PluginConfig
from slos_serve.vllm_plugin.controller import Reporting, StepController
from slos_serve.vllm_plugin.entry import RequestDesk
from slos_serve.vllm_plugin.front.link import OutcomeLink, front_process
from slos_serve.vllm_plugin.guard import Guard
from slos_serve.vllm_plugin.identity import check_profile, engine_labels
from slos_serve.vllm_plugin.live.feed import LiveFeed
from slos_serve.vllm_plugin.llvmlite_names import hide_special_names
from slos_serve.vllm_plugin.metrics import SchedulerMetrics
from slos_serve.vllm_plugin.orphan import end_with_parent
from slos_serve.vllm_plugin.publish import publisher_of
from slos_serve.vllm_plugin.recorder import Recorder
from slos_serve.vllm_plugin.self_test import dry_plan
from slos_serve.vllm_plugin.stop_strings import StopStrings
from slos_serve.vllm_plugin.telemetry import Telemetry
from slos_serve.vllm_plugin.warm_up import warm_up

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.slos_serve")
hide_special_names()


class Steered(Scheduler):
    """What the plug-in adds to a scheduler of vLLM; see :class:`SLOScheduler`.

    ``slo_clock_s`` is the clock of every time it compares; tests replace it.

    Raises:
        UnsupportedEngineError: the configuration is refused; the message names the flag to change.
        InvalidFieldError, ProfileMismatchError: the class file, profile or environment cannot be used.
    """

    slo_clock_s: Callable[[], float] = staticmethod(time.monotonic)
    _slo: StepController | None = None
    _slo_metrics: SchedulerMetrics

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = PluginConfig.from_environment(os.environ)
        self._slo_settings = settings
        stock = capabilities.reason_for_stock(self.vllm_config) or self._slo_reason_to_rest()
        if stock is None:
            self._slo_start(settings)
        elif settings.publish_to is not None:
            raise UnsupportedEngineError(f"a replica must plan its steps, and this one would not: {stock}")
        else:
            logger.warning("slos-serve: every step runs in stock order. %s", stock)
            self._slo_say_unarmed(settings)
        self._slo_say_hello()

    def _slo_say_unarmed(self, settings: PluginConfig) -> None:
        """``slos_serve:armed`` is 0 from the start; without a series nobody could be alerted."""
        try:
            names = (slo_class.name for slo_class in settings.classes)
            self._slo_metrics = SchedulerMetrics(names, engine_labels(self.vllm_config))
            self._slo_metrics.armed(False)
        except Exception:
            logger.warning("slos-serve: no metrics of this server.", exc_info=True)

    def _slo_reason_to_rest(self) -> str | None:
        """Why this engine's steps are not planned although its features are known."""
        if self._slo_settings.profile is None:
            return f"No batch-time profile ({PROFILE_ENV}; `slos-serve profile MODEL` measures one)."
        missing = compat.missing_names(self)
        if missing:
            return f"vLLM {compat.engine_version()} lacks what slos-serve steers by: {', '.join(missing)}."
        version = compat.version_of(compat.engine_version())
        if not compat.OLDEST <= version <= compat.NEWEST:
            logger.warning(
                "slos-serve: vLLM %s is outside the tested range %d.%d to %d.%d; every name it needs is there.",
                compat.engine_version(),
                *compat.OLDEST,
                *compat.NEWEST,
            )
        return None

    def _slo_start(self, settings: PluginConfig) -> None:
        profile = settings.profile
        assert profile is not None
        mismatch = check_profile(settings, self.vllm_config)
        num_classes = len(settings.classes) + 2  # custom numbers, and none
        drafts = min(compat.most_drafts(self), MAX_DRAFT_TOKENS)
        policy = SLOsServePolicy(profile.model, num_classes, replace(settings.planner, max_draft_tokens=drafts))
        logger.info("slos-serve: loading the planner. The first start compiles it, which takes minutes.")
        warm_up(policy.planner)
        stop_strings = StopStrings(self.vllm_config.model_config)
        front = front_process(self.vllm_config) if settings.front_end else None
        link = None if front is None else OutcomeLink(front)
        promises = None if front is None else OutcomeLink(front)
        live = None if link is None or front is None or not settings.live_page else LiveFeed.to(link, front)
        labels = engine_labels(self.vllm_config)
        recorder = Recorder(settings.classes, settings.events_path, stop_strings, labels, link, live)
        self._slo_metrics = recorder.metrics
        is_async = bool(self.vllm_config.scheduler_config.async_scheduling)
        self._slo_metrics.engine(async_scheduling=is_async, profile_mismatch=mismatch)
        control = StepController(
            self,
            policy,
            Guard(settings.fault_limit),
            Reporting(recorder, Telemetry(), publisher_of(settings, policy, front), promises),
            lambda: self.slo_clock_s(),  # noqa: PLW0108  (tests replace the clock later)
            settings.plan_limit_s,
        )
        if live is not None:
            live.look_at(control.book, settings.classes, control.now_s)
            control.telemetry.each_round = live.tick
        failure = dry_plan(self, control)
        if failure is not None:
            control.telemetry.close()
            control.recorder.close()
            self._slo_metrics.armed(False)
            logger.error("slos-serve: every step runs in stock order. The plan at start failed.", exc_info=failure)
            return
        self._slo_desk = RequestDesk(control, settings, stop_strings, front)
        self._slo = control
        if settings.publish_to is not None:  # a router that reads it replaces servers that die
            end_with_parent()
        control.publish_idle()
        control.post_gauges()

    def _slo_say_hello(self) -> None:
        for row in capabilities.active(self.vllm_config):
            logger.info("slos-serve: %s: %s (%s)", row.feature, row.support, row.note)
        logger.info(
            "slos-serve: classes %s, default %s, drafts up to %d, KV cache of %d blocks of %d tokens.",
            ", ".join(slo_class.name for slo_class in self._slo_settings.classes) or "none",
            self._slo_settings.classes.default or "none",
            min(compat.most_drafts(self), MAX_DRAFT_TOKENS),
            compat_kv.total_pool_blocks(self),
            self.block_size,
        )

    # What vLLM calls ------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Enter a request; one whose SLO fields cannot be used is served without a promise and counted."""
        known = self.requests.get(request.request_id)
        super().add_request(request)
        if self._slo is not None:
            if known is None:
                self._slo.guard.run("enter", self._slo_desk.entered, request)
            elif known.request_id in self.requests:
                self._slo.guard.run("enter", self._slo_desk.turns_begun)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plan the step and let the stock scheduler make it."""
        if self._slo is None:
            return super().schedule(*args, **kwargs)
        self._slo.guard.run("learn", self._slo_desk.learn_found)
        throttle_prefills = bool(args[0] if args else kwargs.get("throttle_prefills", False))
        stock = super().schedule
        return self._slo.schedule(lambda: stock(*args, **kwargs), throttle_prefills)

    def get_grammar_bitmask(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM asks for it once a batch is with the workers: the time for what others are to be told."""
        bitmask = super().get_grammar_bitmask(*args, **kwargs)
        if self._slo is not None:
            self._slo.guard.run("publish", self._slo.tell)
            self._slo.telemetry.now()
        return bitmask

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Take in a step's tokens; note when they came and how long the step took."""
        control = self._slo
        if control is None:
            return super().update_from_output(scheduler_output, model_runner_output, *args, **kwargs)
        control.guard.run("drafts", control.learner.verified, scheduler_output, model_runner_output)
        result = super().update_from_output(scheduler_output, model_runner_output, *args, **kwargs)
        control.guard.run("update", control.done, scheduler_output)
        control.guard.run("publish", control.tell)  # where no bitmask was asked for
        if control.book.sessions:
            control.guard.run("update", self._slo_desk.turns_begun)
        return result

    def get_request_counts(self) -> tuple[int, int]:
        """Requests running and waiting; those that a plan has set aside for the moment are counted."""
        num_running, num_waiting = super().get_request_counts()
        if self._slo is None:
            return num_running, num_waiting
        hidden = self._slo.hidden
        return num_running + hidden.running, num_waiting + hidden.waiting

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self._slo is not None:
            self._slo.guard.run("leave", self._slo_desk.leaving, request)
        freed = super()._free_request(request, *args, **kwargs)
        # A connector may keep a finished request's blocks, and vLLM the request: the book has those that go on.
        if self._slo is not None and not (self.requests and self._slo.book.by_id):
            self._slo.guard.run("publish", self._slo.publish_idle)
            self._slo.guard.run("publish", self._slo.post_gauges)
        return freed

    def shutdown(self) -> None:
        """End with the engine."""
        super().shutdown()
        if self._slo is not None:
            control = self._slo
            control.guard.run("shutdown", control.telemetry.close)
            control.guard.run("shutdown", control.recorder.close)
            if control.publisher is not None:
                control.guard.run("shutdown", control.publisher.close)
            if control.front is not None:
                control.guard.run("shutdown", control.front.close)


class SLOSyncScheduler(Steered):
    """:class:`SLOScheduler` on the scheduler that vLLM uses without async scheduling."""


class SLOScheduler(Steered, AsyncScheduler):
    """Keeps per-request latency promises on top of vLLM's scheduler.

    Named on vLLM's command line. What is made is steered, or vLLM's own class, on the base that vLLM itself would use
    for the configuration (:mod:`slos_serve.vllm_plugin.capabilities`).
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """The scheduler for a configuration: steered on the right base, or vLLM's own."""
        config = args[0] if args else kwargs["vllm_config"]
        stock = capabilities.reason_for_stock(config)
        if stock is not None and PluginConfig.from_environment(os.environ).publish_to is None:
            logger.warning("slos-serve: vLLM's own scheduler makes every step. %s", stock)
            return compat.stock_class(config)(*args, **kwargs)
        if cls is SLOScheduler and not config.scheduler_config.async_scheduling:
            return SLOSyncScheduler(*args, **kwargs)
        return super().__new__(cls)
