"""What executed steps teach: how long batches take, which drafts are right, what encoders and loads of KV cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.plan import StepPlan
from slos_serve.core.request import SlotArray
from slos_serve.perf.batch_time import BatchShape
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.request_book import RequestBook
from slos_serve.vllm_plugin.step_clock import StepClock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

# Weight of one more step in the mean time of what runs beside batches.
_BESIDE_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class _Beside:
    """What a step does beside its batch: encoder embeddings to compute, tokens whose KV is loaded within the step."""

    embeds: int
    loaded: int


class StepLearner:
    """Learns from the steps of one scheduler.

    Attributes:
        encoder_s_each: seconds that one encoder embedding adds to a step; 0 until one was seen.
        loaded_s_each: seconds that a token whose KV a connector loads within the step adds to it.
    """

    def __init__(self, policy: SLOsServePolicy, book: RequestBook) -> None:
        self.encoder_s_each = self.loaded_s_each = 0.0
        self._policy = policy
        self._book = book
        self._clock = StepClock()
        self._drafting: set[int] = set()
        self._beside: dict[int, _Beside] = {}

    def next_start_s(self, now_s: float) -> float:
        """When a step scheduled now will start."""
        return self._clock.next_start_s(now_s)

    def scheduled(
        self, output: SchedulerOutput, ran: SlotArray, now_s: float, plan: StepPlan | None
    ) -> tuple[BatchShape, float]:
        """Start the clock on a step; its shape and predicted seconds.

        Args:
            output: what vLLM scheduled.
            ran: its rows, see :meth:`RequestBook.slots_of`.
            now_s: when it was scheduled.
            plan: what it was made from; ``None`` for a step in vLLM's own order.
        """
        drafts = output.scheduled_spec_decode_tokens
        if drafts:
            self._book.drafts_sent(drafts)
            self._drafting.add(id(output))
        if plan is not None and len(plan.draft_tokens):
            self._note_missing_drafts(plan, drafts)
        shape = self._book.shape(ran, output.num_scheduled_tokens, drafts, planned=plan is not None)
        predicted_s = self._policy.model.step_s(shape) * self._policy.correction.factor
        beside = _Beside(self._encoder_embeds(output), self._loaded_tokens(output))
        predicted_s += beside.embeds * self.encoder_s_each + beside.loaded * self.loaded_s_each
        if shape.new_tokens > 0:
            self._clock.scheduled(output, shape, now_s, predicted_s)
            if beside.embeds or beside.loaded:
                self._beside[id(output)] = beside
        return shape, predicted_s

    def done(self, output: SchedulerOutput, now_s: float) -> tuple[BatchShape, float] | None:
        """The step's tokens have come: its shape and seconds; ``None`` if it was not timed."""
        beside = self._beside.pop(id(output), None)
        if self._book.num_slo:
            self._book.tokens_came(output.num_scheduled_tokens, now_s)
        timed = self._clock.done(output, now_s)
        if timed is None:
            return None
        shape, duration_s = timed
        if beside is not None:  # not a sample of the batch-time model
            over_s = duration_s - self._policy.model.step_s(shape) * self._policy.correction.factor
            self._learn_beside(beside, max(over_s, 0.0))
            return None
        self._policy.on_step_done(shape, duration_s)
        return timed

    def rests(self) -> None:
        """No request is left in the engine."""
        self._clock.rests()

    def verified(self, output: SchedulerOutput, result: Any) -> None:
        """Learn from the drafts of a step whose tokens came; called before vLLM takes them in."""
        if id(output) not in self._drafting:
            return
        self._drafting.discard(id(output))
        drafts = output.scheduled_spec_decode_tokens
        verified = []
        for request_id, tokens in drafts.items():
            tracked = self._book.by_id.get(request_id)
            sampled = compat.sampled_tokens(result, request_id)
            if tracked is not None and sampled > 0:
                verified.append((tracked.promise.class_index, len(tokens), sampled - 1))
        self._book.drafts_verified(drafts)
        if verified:
            self._policy.on_verified(*np.array(verified, dtype=np.int64).T)

    def _note_missing_drafts(self, plan: StepPlan, drafts: Any) -> None:
        """A request that was to verify drafts and had none (n-grams found nothing) teaches what a wrong draft does."""
        if not self._policy.planner.drafts.tokens.any():
            return
        book, rows = self._book, self._book.table.rows
        running = rows["output_tokens"][plan.slots] > 0
        none = [
            slot
            for slot in plan.slots[running & (plan.tokens == 1)].tolist()
            if rows["draft_limit"][slot] == 0 and book.by_slot[slot].request.request_id not in drafts
        ]
        classes = rows["class_index"][none].astype(np.int64)
        ones = np.ones(len(none), dtype=np.int64)
        self._policy.on_verified(classes, ones, 0 * ones)

    def _learn_beside(self, beside: _Beside, over_s: float) -> None:
        """Learn from the seconds that a step took beyond its batch; both at once cannot be told apart."""
        if not beside.loaded:
            self.encoder_s_each = _mean(self.encoder_s_each, over_s / beside.embeds)
        elif not beside.embeds:
            self.loaded_s_each = _mean(self.loaded_s_each, over_s / beside.loaded)

    def _loaded_tokens(self, output: SchedulerOutput) -> int:
        """Tokens whose KV a connector loads within a step: of the requests that it starts."""
        by_id, total = self._book.by_id, 0
        for data in output.scheduled_new_reqs:
            tracked = by_id.get(data.req_id)
            if tracked is not None:
                total += tracked.external_tokens
                tracked.external_tokens = 0
        return total

    def _encoder_embeds(self, output: SchedulerOutput) -> int:
        """Encoder embeddings that a step computes."""
        total = 0
        for request_id, inputs in output.scheduled_encoder_inputs.items():
            tracked = self._book.by_id.get(request_id)
            if tracked is not None:
                total += sum(tracked.request.get_num_encoder_embeds(index) for index in inputs)
        return total


def _mean(before: float, seen: float) -> float:
    """A running mean with one more value; the first one counts whole."""
    return before + (_BESIDE_WEIGHT if before else 1.0) * (seen - before)
