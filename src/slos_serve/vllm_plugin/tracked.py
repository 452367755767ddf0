"""One request's promise, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slos_serve.core.slo import SLOClass, Stage
from slos_serve.perf.tasks import CallDue

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class Promise:
    """What a request, or one turn of a streaming-input session, asks for.

    Attributes:
        slo_class: its SLO; ``None`` without one.
        class_index: index for the planner's statistics.
        arrival_s: when it reached the server, on the scheduler's clock.
        ttft_due_s: when its first token is due; inf without a TTFT.
        planned_due_s: when the planner has it due: earlier by margins and by its encoder's time.
        answer_due_s: when its last token is due, or its task; inf without such a promise.
        planned_answer_due_s: when the planner has that due: earlier by a margin, or at the call's share of its task.
        hint_tokens: the client's own forecast of its answer; 0 without one.
        max_tokens: most output tokens.
        tenant: in whose budget it counts; ``None`` for nobody's.
        share: see :func:`slos_serve.core.request.share_of`; ``None`` for its class's.
        weaker: what is asked for in its place, in order, once it cannot be kept.
        call: the call of a task that it is; ``None`` for none.
        last_call: its client says that no call of the task follows.
    """

    slo_class: SLOClass | None
    class_index: int
    arrival_s: float
    ttft_due_s: float
    planned_due_s: float
    answer_due_s: float
    planned_answer_due_s: float
    hint_tokens: int
    max_tokens: int
    tenant: str | None = None
    share: int | None = None
    weaker: tuple[Promise, ...] = ()
    call: CallDue | None = None
    last_call: bool = False

    @property
    def weight(self) -> float:
        """What keeping it is worth to admission."""
        if self.slo_class is None:
            return 1.0
        return max(self.slo_class.weight * (1.0 if self.call is None else self.call.weight), 1e-6)


@dataclass(slots=True)
class Tracked:
    """One unfinished request.

    Attributes:
        request: vLLM's object.
        slot: its row in the planner's table.
        promise: what is asked for, or was given, in its current turn.
        first: what its current turn asked for at first.
        rank: place of ``promise`` in the order of those asked for; 0 for ``first``.
        given: rank of the promise that was made last; ``None`` while none was.
        reason: which promise was given up, ``ttft`` or ``tpot``, when one was.
        planned_preemptions: preemptions that a plan asked for.
        stage: index of the current stage.
        stage_offset: output tokens that came before the current stage.
        stage_start_s: when the first token of the current stage came; ``None`` before.
        first_token_s: when the first token of the turn came; ``None`` before.
        seen_tokens: output tokens accounted for.
        fixed_blocks: KV blocks that it takes when it starts, beside those that grow with its tokens.
        decode_blocks: what of them it keeps once its prompt is computed.
        turn_prompt_tokens: prompt tokens with which the current turn began.
        turns_in_time: False once the first token of an earlier turn came late.
        stages_kept: False once a finished stage missed its TPOT.
        slowest_stage: mean time per output token over its target, of the slowest finished stage.
        open_ticket: by which the API process is told when it is promised something; ``None`` where its client knows.
        drafts_in_flight: drafts in steps whose tokens have not come yet.
        external_tokens: prompt tokens whose KV a connector is to load before it starts, or as it starts.
        local_hit: prompt tokens in the engine's own prefix cache at the last look-up, and the shared ones of them.
        unserved_plans: plans in a row that had it in and whose step left it out.
        forbearance: such plans that are tolerated before a step is stock for it.
    """

    request: Request
    slot: int
    promise: Promise
    first: Promise = field(init=False)
    rank: int = 0
    given: int | None = None
    open_ticket: int | None = None
    reason: str = ""
    planned_preemptions: int = 0
    stage: int = 0
    stage_offset: int = 0
    stage_start_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    seen_tokens: int = 0
    fixed_blocks: int = 0
    decode_blocks: int = 0
    turn_prompt_tokens: int = 0
    turns_in_time: bool = True
    stages_kept: bool = True
    slowest_stage: float = 0.0
    drafts_in_flight: int = 0
    external_tokens: int = 0
    local_hit: tuple[int, int] = (0, 0)
    unserved_plans: int = 0
    forbearance: int = 2

    def __post_init__(self) -> None:
        self.first = self.promise
        self.turn_prompt_tokens = int(self.request.num_prompt_tokens)

    @property
    def first_in_time(self) -> bool:
        """Whether every first token that came was in time for the promise it is held to."""
        came_late = self.first_token_s is not None and self.first_token_s > self.promise.ttft_due_s
        return self.turns_in_time and not came_late

    @property
    def more_stages(self) -> bool:
        """Whether another stage follows the current one."""
        return self.stage + 1 < len(self.stages)

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of its class; none without a promise."""
        return self.promise.slo_class.stages if self.promise.slo_class is not None else ()

    def begin_turn(self, promise: Promise) -> None:
        """Judge the turn that ended and begin the next one."""
        self.stages_kept = self.tpot_kept()
        self.slowest_stage = self.tpot_ratio() or 0.0
        self.turns_in_time = self.first_in_time
        self.promise = self.first = promise
        self.rank, self.given = 0, None if self.given is None else 0
        self.turn_prompt_tokens = int(self.request.num_prompt_tokens)
        self.stage = self.stage_offset = self.seen_tokens = 0
        self.stage_start_s = self.first_token_s = self.last_token_s = None

    def honour(self, rank: int) -> None:
        """Give it the promise that its client was told: by its place in the order of those asked for."""
        several = (self.first, *self.first.weaker)
        self.rank = self.given = min(max(rank, 0), len(several) - 1)
        self.promise = several[self.rank]

    def fall_back(self, earliest_s: float) -> bool:
        """Ask for the next weaker promise; when there is none, what was asked for at first is what it is held to.

        True when there was one: a first token that comes at ``earliest_s`` would be in time for it.
        """
        for rank, weaker in enumerate(self.first.weaker[self.rank :], self.rank + 1):
            if min(weaker.planned_due_s, weaker.planned_answer_due_s) >= earliest_s:
                self.rank, self.promise = rank, weaker
                return True
        self.rank, self.promise = 0, self.first
        return False

    def hold_to_given(self) -> None:
        """Before it is judged: what counts is the promise that was made, else the one asked for at first."""
        self.promise = (self.first, *self.first.weaker)[self.given or 0]

    def tokens_came(self, total: int, now_s: float) -> None:
        """Output tokens up to the ``total``-th came at ``now_s``."""
        if self.stage_start_s is None:
            self.stage_start_s = now_s
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        if len(self.stages) > 1:
            self._cross_stages(total, now_s)
        self.seen_tokens = total

    def ttft_kept(self, now_s: float) -> bool:
        """Whether the TTFT is kept; before the first token: whether it is not yet broken."""
        waits = self.first_token_s is None
        return self.first_in_time and not (waits and now_s > self.promise.ttft_due_s)

    def tpot_kept(self) -> bool:
        """Whether every stage so far kept its mean time per output token."""
        if not self.stages or self.last_token_s is None:
            return self.stages_kept
        in_stage = self.seen_tokens - self.stage_offset
        return self.stages_kept and self._stage_kept(in_stage, self.last_token_s)

    def answer_kept(self, now_s: float, *, ended: bool) -> bool:
        """Whether the complete answer came in time; of one that has not ended: whether that is not yet broken."""
        last_s = self.last_token_s if ended and self.last_token_s is not None else now_s
        return last_s <= self.promise.answer_due_s

    def ttft_s(self) -> float | None:
        """Measured time to first token of the turn; ``None`` before it."""
        return None if self.first_token_s is None else self.first_token_s - self.promise.arrival_s

    def tpot_s(self) -> float | None:
        """Measured mean time per output token of the turn; ``None`` before the second token."""
        if self.first_token_s is None or self.last_token_s is None or self.seen_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.seen_tokens - 1)

    def ttft_ratio(self) -> float | None:
        """Measured over promised time to first token; ``None`` where nothing is promised or measured."""
        measured_s, target_s = self.ttft_s(), self.promise.ttft_due_s - self.promise.arrival_s
        return measured_s / target_s if measured_s is not None and 0.0 < target_s < math.inf else None

    def tpot_ratio(self) -> float | None:
        """Measured over promised time per output token, of the slowest stage; ``None`` as :meth:`ttft_ratio`."""
        slowest = self.slowest_stage
        if self.stages and self.last_token_s is not None:
            slowest = max(slowest, self._over_target(self.seen_tokens - self.stage_offset, self.last_token_s))
        return slowest or None

    def _over_target(self, num_tokens: int, end_s: float) -> float:
        """The current stage's mean time per output token over its target; 0 where there is none."""
        if num_tokens <= 1 or self.stage_start_s is None:
            return 0.0
        return (end_s - self.stage_start_s) / (num_tokens - 1) / self.stages[self.stage].slo.tpot_s

    def _cross_stages(self, total: int, now_s: float) -> None:
        """Move to the next stage when the current one ended with one of the new tokens.

        That token belongs to the stage it ended; the new stage begins with the next one, which may be in flight.
        """
        stages = self.stages
        new_tokens = self.request.output_token_ids[self.seen_tokens : total]
        for position, token in enumerate(new_tokens, self.seen_tokens + 1):
            if self.stage + 1 >= len(stages):
                return
            stage = stages[self.stage]
            in_stage = position - self.stage_offset
            if token != stage.end_token_id and in_stage != stage.max_tokens:
                continue
            self.stages_kept &= self._stage_kept(in_stage, now_s)
            self.slowest_stage = max(self.slowest_stage, self._over_target(in_stage, now_s))
            self.stage += 1
            self.stage_offset = position
            self.stage_start_s = now_s if position < total else None

    def _stage_kept(self, num_tokens: int, end_s: float) -> bool:
        """Whether the current stage's mean time per output token is at or under its target."""
        return self._over_target(num_tokens, end_s) <= 1.0
