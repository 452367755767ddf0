"""``--scheduler-cls slos_serve.vllm_plugin.SLOScheduler``: vLLM's own scheduler, steered step by step.

Each step: view -> plan -> apply -> ``super().schedule()``. While no request in the engine carries a promise nothing is
planned and the step is stock. A plan that throws or takes too long is dropped: that step runs in stock order, is
counted, and its kind is logged once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from slos_serve.core.errors import InvalidFieldError, PlanOverrunError
from slos_serve.core.plan import StepPlan
from slos_serve.core.request import MAX_DRAFT_TOKENS
from slos_serve.core.slo import SLOClass
from slos_serve.perf.batch_time import BatchShape
from slos_serve.planning.warm_up import warm_up
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.config import PROFILE_ENV, PluginConfig
from slos_serve.vllm_plugin.identity import check_profile
from slos_serve.vllm_plugin.orphan import end_with_parent
from slos_serve.vllm_plugin.publish import publisher_of
from slos_serve.vllm_plugin.recorder import Recorder
from slos_serve.vllm_plugin.request_book import RequestBook
from slos_serve.vllm_plugin.slo_args import SloArgs, from_extra_args
from slos_serve.vllm_plugin.steering import steered
from slos_serve.vllm_plugin.step_clock import StepClock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.slos_serve")

MAX_FRONT_END_S = 60.0


class SLOScheduler(AsyncScheduler):
    """Keeps per-request latency promises on top of vLLM's scheduler.

    ``slo_clock_s`` is the clock of every time it compares; tests replace it.

    Raises:
        UnsupportedEngineError: vLLM is outside the supported range or lacks a name that is steered by.
        InvalidFieldError, ProfileMismatchError: the class file, profile or environment cannot be used.
    """

    slo_clock_s: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        compat.check_version(compat.engine_version())
        super().__init__(*args, **kwargs)
        compat.check_scheduler(self)
        settings = PluginConfig.from_environment(os.environ)
        self._slo_settings = settings
        self._slo_classes = {slo_class.name: index for index, slo_class in enumerate(settings.classes)}
        self._slo_book = RequestBook()
        self._slo_clock = StepClock()
        self._slo_starved = False
        self._slo_drafting: set[int] = set()
        self._slo_policy: SLOsServePolicy | None = None
        if settings.profile is not None:
            check_profile(settings, self.vllm_config)
            num_classes = len(settings.classes) + 2  # custom numbers, and none
            most_drafts = min(compat.most_drafts(self), MAX_DRAFT_TOKENS)
            planner = replace(settings.planner, max_draft_tokens=most_drafts)
            self._slo_policy = SLOsServePolicy(settings.profile.model, num_classes, planner)
            warm_up(self._slo_policy.planner)
        self._slo_publisher = publisher_of(settings, self._slo_policy)
        if settings.publish_to is not None:  # whoever reads it replaces servers that die
            end_with_parent()
        self._slo_recorder = Recorder(settings.classes, settings.events_path)
        self._slo_say_hello()
        self._slo_publish_idle()

    def _slo_say_hello(self) -> None:
        if self._slo_policy is None:
            logger.warning(
                "slos-serve: no batch-time profile (%s): every step runs in stock order.",
                PROFILE_ENV,
            )
        logger.info(
            "slos-serve: classes %s, default %s, async scheduling %s, drafts up to %d, KV cache of %d blocks of %d "
            "tokens.",
            ", ".join(self._slo_classes) or "none",
            self._slo_settings.classes.default or "none",
            "on" if self.scheduler_config.async_scheduling else "off",
            min(compat.most_drafts(self), MAX_DRAFT_TOKENS),
            compat.total_blocks(self),
            self.block_size,
        )

    # What vLLM calls ------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Enter a request; one whose SLO fields cannot be used is served without a promise and counted."""
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if is_new and self._slo_policy is not None:
            self._slo_track(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plan the step and let the stock scheduler make it."""
        if not self._slo_book.num_slo or compat.is_paused(self):
            self._slo_publish_unplanned()
            return super().schedule(*args, **kwargs)
        entered_s = time.perf_counter()
        now_s = self.slo_clock_s()
        start_s = self._slo_clock.next_start_s(now_s)
        plan, plan_s, fallback = self._slo_plan(start_s)
        if self._slo_starved:
            # vLLM ran nothing of the last plan (a limit that the planner does not know): its own order gets a turn.
            plan, fallback, self._slo_starved = (
                None,
                self._slo_recorder.starved(),
                False,
            )
        if plan is None:
            ready_s = time.perf_counter()
            output = super().schedule(*args, **kwargs)
            made_s = time.perf_counter()
        else:
            with steered(self, plan, self._slo_book, now_s):
                ready_s = time.perf_counter()
                output = super().schedule(*args, **kwargs)
                made_s = time.perf_counter()
        self._slo_starved = plan is not None and output.total_num_scheduled_tokens == 0
        self._slo_note_drafts(output, plan)
        shape, predicted_s = self._slo_time_step(output, now_s)
        self._slo_recorder.step(
            self._slo_book,
            plan,
            plan_s=plan_s,
            added_s=ready_s - entered_s + time.perf_counter() - made_s,
            shape=shape,
            predicted_s=predicted_s,
            fallback=fallback,
            queues=(len(self.running), len(self.waiting)),
        )
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Take in a step's tokens; note when they came and how long the step took."""
        self._slo_learn_drafts(scheduler_output, *args)
        result = super().update_from_output(scheduler_output, *args, **kwargs)
        if self._slo_policy is not None and scheduler_output.total_num_scheduled_tokens > 0:
            now_s = self.slo_clock_s()
            if self._slo_book.num_slo:
                self._slo_book.tokens_came(scheduler_output.num_scheduled_tokens, now_s)
            timed = self._slo_clock.done(scheduler_output, now_s)
            if timed is not None:
                shape, duration_s = timed
                self._slo_policy.on_step_done(shape, duration_s)
                self._slo_recorder.step_done(shape, duration_s, self._slo_policy.correction.factor)
        return result

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._slo_forget(request)
        freed = super()._free_request(request, *args, **kwargs)
        if not self.requests:
            self._slo_publish_idle()
        return freed

    def shutdown(self) -> None:
        """End with the engine."""
        super().shutdown()
        self._slo_recorder.events.close()
        if self._slo_publisher is not None:
            self._slo_publisher.close()

    # What we add to it ----------------------------------------------------------------------------------------

    def _slo_track(self, request: Request) -> None:
        assert self._slo_policy is not None
        extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
        try:
            asked = from_extra_args(extra_args)
            slo_class = asked.applied(self._slo_settings.classes)
        except InvalidFieldError as error:
            self._slo_recorder.refused(error)
            asked, slo_class = SloArgs(), None
        if slo_class is not None and slo_class.best_effort:
            slo_class = None
        # The front end stamps arrivals on the wall clock; only a difference on that same clock is carried over.
        waited_s = min(max(time.time() - request.arrival_time, 0.0), MAX_FRONT_END_S)
        arrival_s = self.slo_clock_s() - waited_s
        ttft_s = float("inf")
        if slo_class is not None:
            ttft_s = slo_class.slo.ttft_s(self._slo_policy.model.zero_load_s(request.num_prompt_tokens))
        self._slo_book.add(
            request,
            slo_class,
            class_index=self._slo_class_index(slo_class),
            arrival_s=arrival_s,
            ttft_due_s=arrival_s + ttft_s,
            margin_s=self._slo_settings.planner.ttft_margin_s,
            hint_tokens=asked.expected_tokens or 0,
            max_tokens=max(
                min(request.max_tokens, self.max_model_len - request.num_prompt_tokens),
                1,
            ),
        )

    def _slo_class_index(self, slo_class: SLOClass | None) -> int:
        if slo_class is None:
            return len(self._slo_classes) + 1
        return self._slo_classes.get(slo_class.name, len(self._slo_classes))

    def _slo_plan(self, start_s: float) -> tuple[StepPlan | None, float, str | None]:
        """The plan (``None`` for stock order), seconds it took, and why it fell back if it did."""
        assert self._slo_policy is not None
        wall_s, busy_s = time.perf_counter(), time.thread_time()
        try:
            seen_s, view = self.slo_clock_s(), self._slo_book.view(self, start_s)
            plan = self._slo_policy.plan(start_s, view)
            plan_s = time.perf_counter() - wall_s
            self._slo_book.note(plan)
            # Processor time: a plan is not to blame for a core that something else kept busy.
            spent_s = time.thread_time() - busy_s
            if spent_s > self._slo_settings.plan_limit_s:
                raise PlanOverrunError(f"planning took {spent_s * 1e3:.1f} ms")
            if self._slo_publisher is not None:
                self._slo_publisher.after_plan(start_s, view, plan, seen_until_s=seen_s)
            return (plan if len(plan.slots) else None), plan_s, None
        except Exception as error:  # whatever the planner does, serving goes on
            return (
                None,
                time.perf_counter() - wall_s,
                self._slo_recorder.fell_back(error),
            )

    def _slo_note_drafts(self, output: SchedulerOutput, plan: StepPlan | None) -> None:
        """Remember the drafts that a scheduled step verifies.

        A request that was to verify some and had none (n-grams found nothing) teaches what a wrong draft does.
        """
        assert self._slo_policy is not None
        drafts = output.scheduled_spec_decode_tokens
        if drafts:
            self._slo_book.drafts_sent(drafts)
            self._slo_drafting.add(id(output))
        if plan is None or not self._slo_policy.planner.drafting.present.tokens.any():
            return
        book = self._slo_book
        running = book.table.rows["output_tokens"][plan.slots] > 0
        none = [
            slot
            for slot in plan.slots[running & (plan.tokens == 1)].tolist()
            if book.table.rows["draft_limit"][slot] == 0 and book.by_slot[slot].request.request_id not in drafts
        ]
        classes = book.table.rows["class_index"][none].astype(np.int64)
        ones = np.ones(len(none), dtype=np.int64)
        self._slo_policy.on_verified(classes, ones, 0 * ones)

    def _slo_learn_drafts(self, scheduler_output: SchedulerOutput, *args: Any) -> None:
        """Learn from the drafts of a step whose tokens came; called before vLLM takes them in."""
        if id(scheduler_output) not in self._slo_drafting:
            return
        assert self._slo_policy is not None
        self._slo_drafting.discard(id(scheduler_output))
        drafts = scheduler_output.scheduled_spec_decode_tokens
        verified = []
        for request_id, tokens in drafts.items():
            tracked = self._slo_book.by_id.get(request_id)
            sampled = compat.sampled_tokens(args[0], request_id)
            if tracked is not None and sampled > 0:
                verified.append((self._slo_class_index(tracked.slo_class), len(tokens), sampled - 1))
        self._slo_book.drafts_verified(drafts)
        if verified:
            self._slo_policy.on_verified(*np.array(verified, dtype=np.int64).T)

    def _slo_publish_unplanned(self) -> None:
        """Steps without a plan publish too, when it is time."""
        if self._slo_publisher is None:
            return
        now_s = self.slo_clock_s()
        if self._slo_publisher.due(now_s):
            self._slo_publisher.unplanned(now_s, self._slo_book.view(self, now_s))

    def _slo_publish_idle(self) -> None:
        """No step follows the last request, so that it left is published at once."""
        if self._slo_publisher is not None:
            now_s = self.slo_clock_s()
            self._slo_publisher.idle(now_s, self._slo_book.view(self, now_s))

    def _slo_time_step(self, output: SchedulerOutput, now_s: float) -> tuple[BatchShape, float]:
        """Start the clock on a step whose scheduling began at ``now_s``; returns its shape and predicted seconds."""
        assert self._slo_policy is not None
        shape = self._slo_book.shape(output.num_scheduled_tokens, output.scheduled_spec_decode_tokens)
        predicted_s = self._slo_policy.model.step_s(shape) * self._slo_policy.correction.factor
        if shape.new_tokens > 0:
            self._slo_clock.scheduled(output, shape, now_s, predicted_s)
        return shape, predicted_s

    def _slo_forget(self, request: Request) -> None:
        now_s = self.slo_clock_s()
        self._slo_book.tokens_came((request.request_id,), now_s)
        tracked = self._slo_book.by_id.get(request.request_id)
        if tracked is None or self._slo_policy is None:
            return
        ended = compat.finish_kind(request)
        status = self._slo_book.status(tracked)
        if ended in ("stop", "length"):
            index = self._slo_class_index(tracked.slo_class)
            self._slo_policy.on_request_done(index, request.num_prompt_tokens, request.num_output_tokens)
        self._slo_book.remove(request.request_id)
        self._slo_recorder.request_done(tracked, status, ended)
