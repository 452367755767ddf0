"""A request's way in and out: what it is promised when it enters, and how it is judged when it ends."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from vllm.logger import init_logger

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.request import Status, share_of
from slos_serve.core.slo import SLOClass
from slos_serve.core.tasks import task_of
from slos_serve.core.trust import DeniedError, Quotas, Trust
from slos_serve.core.verdict import Verdict, Why
from slos_serve.files.class_file import CUSTOM_CLASS
from slos_serve.perf.tasks import CallAsked, CallDue, TaskBook, TaskEnded, TaskKey
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.class_versions import ClassVersions, version_of
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.controller import StepController
from slos_serve.vllm_plugin.gate import allowed_class
from slos_serve.vllm_plugin.handed import handed_call
from slos_serve.vllm_plugin.recorder import FINISHED, Outcome
from slos_serve.vllm_plugin.request_book import class_index_of
from slos_serve.vllm_plugin.seal import Seal, seal_of
from slos_serve.vllm_plugin.slo_args import TICKET_KEY, TOLD_KEY, SloArgs, from_extra_args
from slos_serve.vllm_plugin.stop_strings import OVERSHOOT_TOKENS, StopStrings, stop_strings_of
from slos_serve.vllm_plugin.tracked import Promise, Tracked

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger("vllm.slos_serve")
MAX_FRONT_END_S = 60.0


class RequestDesk:
    """Enters requests into the book and judges those that leave it.

    Args:
        control: the scheduler's controller.
        settings: classes and margins.
        stop_strings: shared with the recorder.
        front: the API process that judges requests before; ``None`` without one.
    """

    def __init__(
        self, control: StepController, settings: PluginConfig, stop_strings: StopStrings, front: int | None = None
    ) -> None:
        self._control = control
        self._settings = settings
        self._front = front
        self._stop_strings = stop_strings
        first = version_of(settings.class_file, custom_numbers=settings.custom_numbers)
        self._versions = ClassVersions(first, front, custom_numbers=settings.custom_numbers)
        self._class_names = {index: slo_class.name for index, slo_class in enumerate(settings.classes)}
        self._class_indices = {slo_class.name: index for index, slo_class in enumerate(settings.classes)}
        # Lengths that the telemetry thread found to be of finished answers: (class index, prompt, output tokens).
        self._found: deque[tuple[int, int, int]] = deque()
        self._refused: dict[str, int] = {}
        # The newest arrival: as the front end stamped it, and on the scheduler's clock.
        self._latest_arrival = (-math.inf, -math.inf)
        self._quotas = Quotas(settings.trust)
        self._tasks = TaskBook(control.policy.model.zero_load_s)
        self._seal: Seal | None = None
        self._follow(settings.trust)

    def _follow(self, trust: Trust) -> None:
        """Go by this section of the class file: that of the version by which the front end judged a request."""
        if self._seal is None and trust.knows_tenants:
            self._seal = seal_of(os.environ, may_make=self._settings.publish_to is None)
        self._trust = trust
        self._quotas.follow(trust)

    # Entering -------------------------------------------------------------------------------------------------

    def entered(self, request: Request) -> None:
        """vLLM has taken a new request in."""
        control = self._control
        ticket = self._tell_router(request)
        promise = self._with_task(request, *self._promise_of(request, request.num_prompt_tokens))
        needs, most_tokens = control.limits.needs, request.num_prompt_tokens + promise.max_tokens
        fixed = needs.fixed_blocks(most_tokens)
        decoding = needs.decode_blocks(most_tokens) if needs.shrinks else fixed
        tracked = control.book.add(request, promise, fixed_blocks=fixed, decode_blocks=decoding)
        if not self._honour(tracked) and self._front is not None:
            tracked.open_ticket = ticket
        control.hits.waits((tracked,))
        control.queues.entered(tracked)
        if stop_strings_of(request):
            control.telemetry.post(self._stop_strings.load)

    def _tell_router(self, request: Request) -> int | None:
        """The router that sent a request learns from the next publication that it has come; returns its ticket."""
        publisher, sampling = self._control.publisher, request.sampling_params
        ticket = None if sampling is None else (sampling.extra_args or {}).get(TICKET_KEY)
        if publisher is None or not isinstance(ticket, int):
            return None
        publisher.entered(self._control.now_s(), ticket)
        return ticket

    def _honour(self, tracked: Tracked) -> bool:
        """What the API process has told the client is promised from now on, before a plan has seen the request.

        False where it was told no promise.
        """
        sampling = tracked.request.sampling_params
        rank = None if sampling is None else (sampling.extra_args or {}).get(TOLD_KEY)
        if self._front is None or not isinstance(rank, int) or tracked.request.resumable:
            return False
        control = self._control
        if not control.book.honour(tracked, rank):
            return False
        rows = control.book.table.rows[[tracked.slot]]
        control.policy.planner.shares.decided(rows["share"], np.ones(1, dtype=np.bool_), rows["weight"])
        return True

    def continued(self, request: Request) -> None:
        """A streaming-input session goes on with another chunk: its promise counts from the chunk's arrival."""
        tracked = self._control.book.by_id.get(request.request_id)
        if tracked is None or compat.is_parked(request):
            return
        chunk_tokens = max(request.num_prompt_tokens - request.num_computed_tokens, 1)
        promise, _ = self._promise_of(request, chunk_tokens)
        self._control.book.begin_turn(tracked, promise)
        self._control.queues.changed()

    def turns_begun(self) -> None:
        """Sessions whose next chunk was queued go on inside vLLM's ``update_from_output``: find those."""
        for tracked in self._control.book.sessions.values():
            if tracked.request.num_prompt_tokens != tracked.turn_prompt_tokens:
                self.continued(tracked.request)

    def _promise_of(self, request: Request, new_tokens: int) -> tuple[Promise, SloArgs]:
        """What it is promised by itself, and what it asks for."""
        extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
        asked, slo_class, tenant = self._granted(extra_args, new_tokens, request.arrival_time)
        arrival_s = self._arrival_s(request.arrival_time)
        first, *weaker = [None] if slo_class is None else slo_class.promises
        several = [self._one_promise(request, asked, one, new_tokens, arrival_s) for one in (first, *weaker)]
        place = self._trust.place(tenant)
        share = share_of(several[0].class_index, len(self._class_indices) + 2, place)
        return replace(several[0], tenant=tenant, share=share, weaker=tuple(several[1:])), asked

    def _with_task(self, request: Request, promise: Promise, asked: SloArgs) -> Promise:
        """The promise of a call of a task: its answer is due when its share of the task is over."""
        task = task_of(promise.slo_class)
        if task is None or asked.session_id is None or request.resumable:
            return promise
        key = TaskKey(promise.tenant or "", asked.session_id)
        call = self._handed_call(request, key, promise.arrival_s) or self._begun_call(
            key,
            CallAsked(
                task=task,
                class_index=promise.class_index,
                arrival_s=promise.arrival_s,
                prompt_tokens=request.num_prompt_tokens,
                max_tokens=promise.max_tokens,
                hint_tokens=promise.hint_tokens,
                last=asked.last_round,
            ),
        )
        margin_s = self._settings.planner.ttft_margin_s
        return replace(
            promise,
            call=call,
            last_call=asked.last_round,
            answer_due_s=min(promise.answer_due_s, call.task_due_s),
            planned_answer_due_s=min(promise.planned_answer_due_s, call.due_s - margin_s),
        )

    def _arrival_s(self, stamped_at: float) -> float:
        """When a request came, on the scheduler's clock.

        The front end stamps arrivals on the wall clock; only a difference on that same clock is carried over. The two
        clocks are read one after the other, and a thread that is interrupted in between must not make a later request
        due before an earlier one of its class.
        """
        waited_s = min(max(time.time() - stamped_at, 0.0), MAX_FRONT_END_S)
        arrival_s = self._control.now_s() - waited_s
        latest_at, latest_s = self._latest_arrival
        if stamped_at >= latest_at:
            arrival_s = max(arrival_s, latest_s)
            self._latest_arrival = stamped_at, arrival_s
        return arrival_s

    def _handed_call(self, request: Request, key: TaskKey, arrival_s: float) -> CallDue | None:
        """The call as the ingress of a fleet handed it over, which keeps the only book of its tasks."""
        if self._settings.publish_to is None or request.sampling_params is None:
            return None
        return handed_call(request.sampling_params.extra_args, key, arrival_s)

    def _begun_call(self, key: TaskKey, asked: CallAsked) -> CallDue:
        call, ended = self._tasks.begin(key, asked)
        self._tasks_ended(ended)
        return call

    def _one_promise(
        self, request: Request, asked: SloArgs, slo_class: SLOClass | None, new_tokens: int, arrival_s: float
    ) -> Promise:
        control, settings = self._control, self._settings
        ttft_s = float("inf")
        if slo_class is not None:
            ttft_s = slo_class.slo.ttft_s(control.policy.model.zero_load_s(new_tokens))
        e2e_s = float("inf") if slo_class is None else slo_class.slo.e2e_s
        encoder_s = compat.encoder_embeds(request) * control.learner.encoder_s_each
        return Promise(
            slo_class=slo_class,
            class_index=class_index_of(self._class_indices, slo_class),
            arrival_s=arrival_s,
            ttft_due_s=arrival_s + ttft_s,
            planned_due_s=arrival_s + ttft_s - settings.planner.ttft_margin_s - encoder_s,
            answer_due_s=arrival_s + e2e_s,
            planned_answer_due_s=arrival_s + e2e_s - settings.planner.ttft_margin_s,
            hint_tokens=asked.expected_tokens or 0,
            max_tokens=max(min(request.max_tokens, control.scheduler.max_model_len - request.num_prompt_tokens), 1),
        )

    def _granted(
        self, extra_args: Mapping[str, object] | None, new_tokens: int, arrival_at: float
    ) -> tuple[SloArgs, SLOClass | None, str | None]:
        """What it asks for, the class it gets, and who asks; judged here again, whatever the front end said."""
        now_s = self._control.now_s()
        try:
            asked = from_extra_args(extra_args, arrival_at)
            version = self._versions.version_of(extra_args)
            self._follow(version.trust)
            tenant = None if self._seal is None else self._seal.opened(asked.tenant)
            slo_class = allowed_class(version.trust, version.classes, asked, tenant)
            if slo_class is None or slo_class.best_effort:
                return asked, None, tenant
            self._quotas.take(now_s, tenant)
        except InvalidFieldError as error:
            self._refuse(error)
            return SloArgs(), None, None
        except DeniedError as denied:
            self._control.telemetry.post(self._control.recorder.denied, denied.why)
            return asked, None, tenant
        self._quotas.used(now_s, tenant, new_tokens)
        return asked, slo_class, tenant

    def _refuse(self, error: InvalidFieldError) -> None:
        """A request's SLO fields could not be used: it is served without a promise."""
        self._control.telemetry.post(self._control.recorder.invalid_field)
        seen = self._refused[error.field] = self._refused.get(error.field, 0) + 1
        self._control.guard.count(f"field {error.field}")
        if seen == 1:
            logger.warning("slos-serve: request without a promise: %s", error)

    # Leaving --------------------------------------------------------------------------------------------------

    def leaving(self, request: Request) -> None:
        """vLLM is about to free a request: judge it and forget it."""
        control, book = self._control, self._control.book
        now_s = control.now_s()
        tracked = book.last_tokens(request.request_id, now_s)
        if tracked is None:
            return
        ended = compat.finish_kind(request)
        if ended == "abort" and request.resumable and tracked.first_token_s is not None:
            ended = "stop"  # a session that its client has closed after an answer
        if tracked.promise.slo_class is not None:
            self._quotas.used(now_s, tracked.first.tenant, request.num_output_tokens)
        outcome = self._outcome(tracked, ended, now_s)
        self._call_ended(tracked, outcome, now_s)
        book.remove(request.request_id)
        control.forget(tracked)
        stop = stop_strings_of(request)
        lengths = (tracked.promise.class_index, request.num_prompt_tokens, request.num_output_tokens)
        if ended == "abort" and stop and request.num_output_tokens:
            longest = max(len(text.encode()) for text in stop) + OVERSHOOT_TOKENS
            tail = list(request.output_token_ids[-longest:])
            control.telemetry.post(self._judge_abort, outcome, tail, stop, lengths)
            return
        if ended in ("stop", "length"):
            control.policy.on_request_done(*lengths)
        control.telemetry.post(control.recorder.request_done, outcome, time.time())

    def _call_ended(self, tracked: Tracked, outcome: Outcome, now_s: float) -> None:
        """A call of a task left. One that a stop string may have cut is taken for whole."""
        call = tracked.first.call
        if call is None:
            return
        finished = outcome.finished in FINISHED
        cut = outcome.finished == "abort" and bool(outcome.output_tokens and stop_strings_of(tracked.request))
        ended = self._tasks.call_ended(
            call,
            tracked.last_token_s if finished and tracked.last_token_s is not None else now_s,
            outcome.output_tokens,
            finished=finished or cut,
            promised=tracked.given is not None,
            last=tracked.first.last_call,
        )
        self._tasks_ended([] if ended is None else [ended])

    def _tasks_ended(self, several: list[TaskEnded]) -> None:
        for ended in several:
            name = self._class_names.get(ended.class_index, CUSTOM_CLASS)
            self._control.telemetry.post(self._control.recorder.task_done, name, ended, time.time())

    def _judge_abort(self, outcome: Outcome, tail: list[int], stop: list[str], lengths: tuple[int, int, int]) -> None:
        """In the telemetry thread: an answer that a stop string ended teaches its length like any other."""
        if self._control.recorder.request_aborted(outcome, tail, stop, time.time()):
            self._found.append(lengths)

    def learn_found(self) -> None:
        """Learn the lengths that the telemetry thread has found meanwhile."""
        while self._found:
            self._control.policy.on_request_done(*self._found.popleft())

    def _outcome(self, tracked: Tracked, ended: str, now_s: float) -> Outcome:
        request, given = tracked.request, tracked.given
        given_up = tracked.rank != given or self._control.book.status(tracked) == Status.BEST_EFFORT
        tracked.hold_to_given()
        slo_class = tracked.promise.slo_class
        verdict = Verdict.NO_SLO
        if slo_class is not None:
            verdict = Verdict.BEST_EFFORT if given is None else Verdict.SECOND_BEST if given else Verdict.ADMITTED
        has_slo = slo_class is not None
        lost = given is not None and given_up
        kept = tracked.ttft_kept(now_s)
        if ended in FINISHED:
            kept = kept and tracked.first_token_s is not None
        return Outcome(
            request_id=request.request_id,
            slo_class=slo_class.name if slo_class is not None else None,
            verdict=verdict,
            rank=given,
            lost=lost,
            reason=why(verdict, lost, tracked.reason),
            prompt_tokens=request.num_prompt_tokens,
            output_tokens=request.num_output_tokens,
            num_preemptions=request.num_preemptions,
            engine_preemptions=max(request.num_preemptions - tracked.planned_preemptions, 0),
            finished=ended,
            ttft_ok=kept if has_slo else None,
            tpot_ok=tracked.tpot_kept() if has_slo else None,
            e2e_ok=tracked.answer_kept(now_s, ended=ended in FINISHED) if has_slo else None,
            ttft_s=rounded(tracked.ttft_s()),
            tpot_s=rounded(tracked.tpot_s()),
            ttft_ratio=rounded(tracked.ttft_ratio()) if has_slo else None,
            tpot_ratio=rounded(tracked.tpot_ratio()) if has_slo else None,
            forecast_tokens=self._forecast_tokens(tracked.promise),
        )

    def _forecast_tokens(self, promise: Promise) -> float:
        """Output tokens that the planner expects of a request that has not begun."""
        expected = float(self._control.policy.planner.lengths.table()[promise.class_index, 0])
        return min(promise.hint_tokens or expected, float(promise.max_tokens))


def why(verdict: Verdict, lost: bool, given_up: str) -> Why:
    """The reason of an engine's verdict; ``given_up`` is the promise that was, ``ttft`` or ``tpot``."""
    if verdict is Verdict.NO_SLO:
        return Why.NO_SLO
    if verdict in (Verdict.ADMITTED, Verdict.SECOND_BEST) and not lost:
        return Why.FITS
    return {"ttft": Why.TTFT_TOO_LATE, "tpot": Why.DECODE_RATE}.get(given_up, Why.PASSED_OVER)


def rounded(seconds: float | None) -> float | None:
    """To a tenth of a millisecond, for events."""
    return None if seconds is None else round(seconds, 4)
