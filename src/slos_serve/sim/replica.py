"""One engine in virtual time: a policy is asked for a step, the step runs, again.

Assumes what a real engine gives a scheduler: it is asked for the next step when the last one ended, sees every token
produced so far, and does not know how long an answer will be. Output lengths stay in the workload; the request table
holds only ``max_tokens`` and a forecast. Who runs and who waits is :mod:`slos_serve.sim.occupancy`'s.
"""

from __future__ import annotations

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import SlotArray, Status
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.policies.base import Policy
from slos_serve.sim import step as rules
from slos_serve.sim.faults import PlanFaultError, StuckError
from slos_serve.sim.limits import EngineLimits, ReplicaSettings
from slos_serve.sim.model_error import StepFactors
from slos_serve.sim.occupancy import Occupancy
from slos_serve.sim.recording import Recording

_FAULTS = {
    rules.TOO_MANY_TOKENS: "more tokens than max_num_batched_tokens",
    rules.NO_TOKENS: "an entry without tokens",
    rules.BEYOND_END: "more tokens than the request has left to compute",
    rules.TWICE: "a slot twice",
    rules.TOO_MANY_SEQS: "more running requests than max_num_seqs",
    rules.UNKNOWN_SLOT: "a slot that holds no request",
    rules.WRONG_DRAFT: "draft tokens for a request that is not decoding",
}
# A replica that plans nothing is asked again after this long, this often at most before the run is called stuck.
IDLE_TICK_S = 0.005
MAX_EMPTY_PLANS = 2_000


class Replica:
    """Requests in an engine and their progress. Times are virtual seconds.

    Attributes:
        index: position among the cluster's replicas.
        busy: a step is executing.
        alive: False after :meth:`die`.
        prefill_only: calls leave with their first token; another replica generates the rest.
    """

    def __init__(
        self,
        index: int,
        policy: Policy,
        batch_time: BatchTimeModel,
        limits: EngineLimits,
        recording: Recording,
        settings: ReplicaSettings,
        prefill_only: bool = False,
    ) -> None:
        self.index = index
        self.prefill_only = prefill_only
        self.policy = policy
        self.busy = False
        self.alive = True
        self._batch_time = batch_time
        self._limits = limits
        self._recording = recording
        self._settings = settings
        self._occupancy = Occupancy(limits, recording, prefill_only, settings.oracle_lengths)
        self._factors = StepFactors(settings.error, settings.seed, index)
        self._empty_plans = 0
        self._unseen: list[int] = []
        self._step_count = 0
        self._step_shape = BatchShape(0)
        self._step_start_s = 0.0

    # ------------------------------------------------------------------------------------------------- requests

    @property
    def view(self) -> EngineView:
        """What the policy sees."""
        return self._occupancy.view

    @property
    def num_requests(self) -> int:
        """Running and waiting, those that the policy has not seen included."""
        return self.num_running + self.num_waiting + len(self._unseen)

    @property
    def num_running(self) -> int:
        """Requests that hold KV."""
        return self._occupancy.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that hold none, as far as the policy has seen them."""
        return self._occupancy.num_waiting

    def fits(self, call: int) -> bool:
        """Whether the call's longest form could ever be held."""
        row = self._recording.workload.calls[call]
        tokens = int(row["prompt_tokens"]) + int(row["output_tokens"])
        return -(-tokens // self._limits.block_size) <= self._limits.total_blocks

    def cached_tokens(self, call: int) -> int:
        """Prompt tokens that this replica's prefix cache would supply now."""
        return self._occupancy.cached_tokens(call)

    def add(self, call: int, arrival_s: float, tokens_done: int = 0, output_tokens: int = 0) -> int:
        """Enter a call that arrived at ``arrival_s``; returns its slot.

        Args:
            call: row of the workload.
            arrival_s: when its client sent it; promises count from there.
            tokens_done: prompt tokens whose KV comes from another replica (disaggregated prefill).
            output_tokens: tokens it already has from there.
        """
        slot = self._occupancy.enter(call, arrival_s, tokens_done, output_tokens)
        if self._settings.plan_ahead and self.busy:
            self._unseen.append(slot)
        else:
            self._occupancy.wait(slot)
        record = self._recording.calls[call]
        record["arrival_s"] = arrival_s
        record["replica"] = self.index
        return slot

    # ------------------------------------------------------------------------------------------------- steps

    def start_step(self, now_s: float) -> float | None:
        """Ask the policy for a step and start it.

        Returns:
            When it ends, or ``None`` when nothing is to run (no requests, or an empty plan).

        Raises:
            PlanFaultError: the plan breaks a rule of the engine.
            StuckError: the policy keeps planning nothing while requests wait.
        """
        unseen, self._unseen = self._unseen, []
        end_s = self._plan_step(now_s)
        for slot in unseen:
            self._occupancy.wait(slot)
        return end_s

    def _plan_step(self, now_s: float) -> float | None:
        occupancy = self._occupancy
        if occupancy.num_running + occupancy.num_waiting == 0:
            return None
        plan = self.policy.plan(now_s, occupancy.show())
        try:
            if len(plan.preempt):
                occupancy.preempt(plan.preempt)
            if len(plan.rejected):
                occupancy.reject(plan.rejected)
        except PlanFaultError as error:
            where = f"replica {self.index} at {now_s:.3f} s"
            raise PlanFaultError(f"{where}: {type(self.policy).__name__} {error}") from error
        if len(plan.slots) == 0:
            self._commit(plan, plan.slots)
            self._idle(now_s)
            return None
        self._check(now_s, plan)
        duration_s = self._execute(now_s, plan)
        return None if duration_s is None else now_s + duration_s

    def _idle(self, now_s: float) -> None:
        if self.num_requests:
            self._recording.num_empty_plans += 1
            self._empty_plans += 1
            if self._empty_plans > MAX_EMPTY_PLANS:
                raise StuckError(
                    f"replica {self.index} at {now_s:.3f} s: {type(self.policy).__name__} planned nothing "
                    f"{MAX_EMPTY_PLANS} times running, with {self.num_running} running and {self.num_waiting} waiting"
                )

    def _check(self, now_s: float, plan: StepPlan) -> None:
        limits, occupancy = self._limits, self._occupancy
        fault, where = rules.check_plan(
            occupancy.view.table.rows,
            occupancy.slots.present,
            plan.slots,
            plan.tokens,
            plan.draft_tokens,
            occupancy.num_running,
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            occupancy.slots.seen,
        )
        if fault != rules.NO_FAULT:
            entry = f" (entry {where}: slot {plan.slots[where]}, {plan.tokens[where]} tokens)" if where >= 0 else ""
            name = type(self.policy).__name__
            raise PlanFaultError(f"replica {self.index} at {now_s:.3f} s: {name} planned {_FAULTS[fault]}{entry}")

    def _execute(self, now_s: float, plan: StepPlan) -> float | None:
        """Give blocks, start requests, and compute how long the step takes; ``None`` when nothing could run."""
        occupancy = self._occupancy
        slots, view = occupancy.slots, occupancy.view
        totals = rules.start_step(
            view.table.rows,
            slots.held_blocks,
            occupancy.running,
            occupancy.num_running,
            plan.slots,
            plan.tokens,
            plan.draft_tokens,
            view.free_blocks,
            self._limits.block_size,
            slots.step_slots,
            slots.step_tokens,
            slots.step_drafts,
            slots.scratch,
        )
        num_running, num_preempted = int(totals[rules.NUM_RUNNING]), int(totals[rules.NUM_PREEMPTED])
        occupancy.after_start(plan.slots, num_running, num_preempted, int(totals[rules.FREE_BLOCKS]))
        self._recording.num_no_room += int(totals[rules.NO_ROOM])
        self._step_count = int(totals[rules.NUM_SEQS])
        self._commit(plan, slots.step_slots[: self._step_count])
        if self._step_count == 0:
            self._idle(now_s)
            return None
        self._empty_plans = 0
        shape = BatchShape(
            int(totals[rules.NEW_TOKENS]),
            int(totals[rules.CONTEXT_TOKENS]),
            int(totals[rules.QUAD_TOKENS2]),
            self._step_count,
            int(totals[rules.DRAFT_STEPS]),
            int(totals[rules.DRAFT_TOKENS]),
        )
        return self._begin(now_s, shape, plan.predicted_s)

    def _begin(self, now_s: float, shape: BatchShape, predicted_s: float) -> float:
        duration_s = self._factors.duration_s(now_s, self._batch_time.step_s(shape)) + self._settings.scheduling_s
        self._step_shape = shape
        self._step_start_s = now_s
        self.busy = True
        self._recording.num_steps += 1
        used = self._limits.total_blocks - self.view.free_blocks
        self._recording.steps.add(
            (
                now_s,
                duration_s,
                predicted_s,
                self.index,
                shape.num_seqs,
                shape.new_tokens,
                self.num_running,
                self.num_waiting,
                used,
            )
        )
        return duration_s

    def finish_step(self, now_s: float) -> list[int]:
        """End the step that runs; returns the calls that finished in it."""
        occupancy, recording = self._occupancy, self._recording
        slots = occupancy.slots
        num_finished = rules.finish_step(
            occupancy.view.table.rows,
            slots.call_of,
            occupancy.calls,
            occupancy.arrivals_s,
            slots.step_slots,
            slots.step_tokens,
            slots.step_drafts,
            self._step_count,
            now_s,
            self._settings.seed,
            recording.token_s,
            recording.token_start,
            slots.scratch,
            slots.step_accepted,
        )
        self.busy = False
        if self._step_shape.draft_steps:
            self._tell_verified()
        self.policy.on_step_done(self._step_shape, now_s - self._step_start_s)
        return [self._finish(int(slot), now_s) for slot in slots.scratch[:num_finished].copy()]

    def _tell_verified(self) -> None:
        """Let the policy learn from the drafts of the step that ended."""
        arrays, count = self._occupancy.slots, self._step_count
        accepted = arrays.step_accepted[:count]
        known = accepted >= 0
        drafted, accepted = arrays.step_drafts[:count][known], accepted[known]
        slots = arrays.step_slots[:count][known]
        self._recording.num_drafted += int(drafted.sum())
        self._recording.num_accepted += int(accepted.sum())
        self.policy.on_verified(self.view.table.rows["class_index"][slots], drafted, accepted)

    def _finish(self, slot: int, now_s: float) -> int:
        call, whole = self._occupancy.finish(slot, now_s)
        if whole:
            row = self._occupancy.calls[call]
            self.policy.on_request_done(int(row["class_index"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
        return call

    def _commit(self, plan: StepPlan, ran: SlotArray) -> None:
        """Let the policy make its promises, and record them."""
        calls, call_of, status = self._recording.calls, self._occupancy.slots.call_of, self.view.table.rows["status"]
        self.policy.commit(plan, self.view, ran)
        promised = plan.admitted[status[plan.admitted] == Status.ADMITTED]
        calls["admitted"][call_of[promised]] = 1
        calls["demoted"][call_of[plan.demoted]] = 1

    def die(self) -> tuple[list[int], list[int]]:
        """Stop for good; returns the calls that had not begun to stream, and those that had (lost)."""
        self.alive = False
        self.busy = False
        unseen, self._unseen = self._unseen, []
        return self._occupancy.lose_all(unseen)
