"""One engine in virtual time: requests, KV blocks and a policy, advanced step by step.

Assumes what a real engine gives a scheduler: it is asked for the next step when the last one ended, sees every token
produced so far, and does not know how long an answer will be. Output lengths stay in the workload; the request table
holds only ``max_tokens`` and a forecast.
"""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import RequestTable, SlotArray, Status
from slos_serve.core.slo import SLOClass
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.policies.base import Policy
from slos_serve.sim import step as rules
from slos_serve.sim.faults import PlanFaultError, StuckError
from slos_serve.sim.limits import EngineLimits, ReplicaSettings
from slos_serve.sim.model_error import StepFactors
from slos_serve.sim.prefix_cache import PrefixCache
from slos_serve.sim.recording import Recording
from slos_serve.sim.slots import Slots

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


# Steps carried out at once where no plan decides them.
MOST_PLAIN = 256


class Replica:
    """Requests in an engine and their progress. Times are virtual seconds.

    Attributes:
        index: position among the cluster's replicas.
        view: what the policy sees.
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
        self._calls = recording.workload.calls
        if prefill_only:
            self._calls = self._calls.copy()
            self._calls["output_tokens"] = 1
        self._classes: tuple[SLOClass, ...] = recording.workload.classes
        self._arrivals_s = np.ascontiguousarray(recording.calls["arrival_s"])
        self._factors = StepFactors(settings.error, settings.seed, index)
        self._cache = PrefixCache(limits.block_size) if limits.prefix_cache else None
        self._empty_plans = 0
        self._unseen: list[int] = []
        table = RequestTable(64)
        self._running = np.empty(limits.max_num_seqs + 1, dtype=np.int64)
        self._num_running = 0
        self._waiting = np.empty(64, dtype=np.int64)
        self._num_waiting = 0
        self.view = EngineView(
            table=table,
            running=self._running[:0],
            waiting=self._waiting[:0],
            free_blocks=limits.total_blocks,
            total_blocks=limits.total_blocks,
            block_size=limits.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        self._slots = Slots(len(table.rows))
        self._step_count = 0
        self._step_shape = BatchShape(0)
        self._step_start_s = 0.0
        self._coefficients = batch_time.coefficients
        self._plain_times_s, self._plain_free = np.empty((2, MOST_PLAIN)), np.empty(MOST_PLAIN, dtype=np.int64)

    # ------------------------------------------------------------------------------------------------- requests

    @property
    def num_requests(self) -> int:
        """Running and waiting, those that the policy has not seen included."""
        return self._num_running + self._num_waiting + len(self._unseen)

    @property
    def num_running(self) -> int:
        """Requests that hold KV."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """Requests that hold none."""
        return self._num_waiting

    def fits(self, call: int) -> bool:
        """Whether the call's longest form could ever be held."""
        row = self._recording.workload.calls[call]
        tokens = int(row["prompt_tokens"]) + int(row["output_tokens"])
        return -(-tokens // self._limits.block_size) <= self._limits.total_blocks

    def cached_tokens(self, call: int) -> int:
        """Prompt tokens that this replica's prefix cache would supply now."""
        if self._cache is None:
            return 0
        return self._cache.peek(int(self._calls["session"][call]), int(self._calls["prompt_tokens"][call]))

    def add(self, call: int, arrival_s: float, tokens_done: int = 0, output_tokens: int = 0) -> int:
        """Enter a call that arrived at ``arrival_s``; returns its slot.

        Args:
            call: row of the workload.
            arrival_s: when its client sent it; promises count from there.
            tokens_done: prompt tokens whose KV comes from another replica (disaggregated prefill).
            output_tokens: tokens it already has from there.
        """
        row = self._calls[call]
        slo_class = self._classes[int(row["class_index"])]
        table = self.view.table
        session = int(row["session"])
        cached = tokens_done or self.cached_tokens(call)
        slot = table.add(
            arrival_s=arrival_s,
            prompt_tokens=int(row["prompt_tokens"]),
            max_tokens=int(row["max_tokens"]),
            ttft_due_s=arrival_s + float(row["ttft_s"]),
            tpot_s=float(row["tpot_s"]),
            class_index=int(row["class_index"]),
            weight=slo_class.weight,
            max_stall_s=slo_class.max_stall_ms / 1000.0,
            hint_tokens=self._true_length(call) if self._settings.oracle_lengths else 0,
            cached_tokens=cached,
            missed=bool(self._recording.session_missed[session]),
        )
        self._slots.fit(len(table.rows))
        self._slots.enter(slot, call)
        self._arrivals_s[call] = arrival_s
        if output_tokens:
            self._take_over(slot, call, output_tokens)
        if self._cache is not None and cached and not tokens_done:
            self._cache.expect(session, slot)
        if self._settings.plan_ahead and self.busy:
            self._unseen.append(slot)
        else:
            self._append_waiting(slot)
        record = self._recording.calls[call]
        record["arrival_s"] = arrival_s
        record["replica"] = self.index
        return slot

    def _true_length(self, call: int) -> int:
        return int(self._recording.workload.calls["output_tokens"][call])

    def _take_over(self, slot: int, call: int, output_tokens: int) -> None:
        """Progress that a call brings from the replica that prefilled it."""
        recording = self._recording
        row = self.view.table.rows[slot]
        first = recording.token_start[call]
        times = recording.token_s[first : first + output_tokens]
        row["output_tokens"] = output_tokens
        row["stage_tokens"] = output_tokens
        row["stage_start_s"] = self._arrivals_s[call] + float(times[0])
        row["last_token_s"] = self._arrivals_s[call] + float(times[-1])

    def _append_waiting(self, slot: int) -> None:
        if self._num_waiting == len(self._waiting):
            self._waiting = np.concatenate((self._waiting, np.empty_like(self._waiting)))
        self._waiting[self._num_waiting] = slot
        self._num_waiting += 1

    def _remove(self, slot: int) -> int:
        """Free a slot that is in no list any more; returns its call."""
        self.view.table.remove(slot)
        return self._slots.leave(slot)

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
            self._append_waiting(slot)
        return end_s

    def run_plain_decodes(self, now_s: float, until_s: float) -> float:
        """Carry out at once the steps that no plan decides: everything runs, nobody waits, the policy decodes it all.

        Args:
            now_s: when the first of them may start.
            until_s: when something else happens.

        Returns:
            When the last of them ended; ``now_s`` when there are none.
        """
        policy, limits = self.policy, self._limits
        if self._num_waiting or self._unseen or not self._num_running or not self._factors.exact:
            return now_s
        if not getattr(policy, "decodes_all", 0) >= self._num_running:
            return now_s
        if self._num_running > limits.max_num_batched_tokens:
            return now_s
        recording = self._recording
        count = rules.plain_decodes(
            self.view.table.rows,
            self._slots.held_blocks,
            self._running,
            self._num_running,
            self._slots.call_of,
            self._calls,
            self._arrivals_s,
            self.view.free_blocks,
            limits.block_size,
            self._coefficients,
            now_s,
            until_s,
            self._settings.seed,
            recording.token_s,
            recording.token_start,
            self._slots.step_slots,
            self._slots.step_tokens,
            self._slots.step_drafts,
            self._slots.scratch,
            self._slots.step_accepted,
            self._plain_times_s,
            self._plain_free,
        )
        if count == 0:
            return now_s
        self.view.free_blocks = int(self._plain_free[count - 1])
        self._shrink_cache()
        recording.num_steps += count
        running = self._num_running
        for start_s, duration_s, free in zip(*self._plain_times_s[:, :count], self._plain_free[:count], strict=True):
            used = limits.total_blocks - int(free)
            recording.steps.add((start_s, duration_s, 0.0, self.index, running, running, running, 0, used))
        return float(self._plain_times_s[:, count - 1].sum())

    def _plan_step(self, now_s: float) -> float | None:
        if self._num_running + self._num_waiting == 0:
            return None
        view = self.view
        view.running = self._running[: self._num_running]
        view.waiting = self._waiting[: self._num_waiting]
        plan = self.policy.plan(now_s, view)
        self._note_verdicts(plan)
        if len(plan.preempt):
            self._preempt(plan.preempt)
        if len(plan.rejected):
            self._reject(plan.rejected)
        if len(plan.slots) == 0:
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
                    f"{MAX_EMPTY_PLANS} times running, with {self._num_running} running and {self._num_waiting} waiting"
                )

    def _check(self, now_s: float, plan: StepPlan) -> None:
        limits = self._limits
        fault, where = rules.check_plan(
            self.view.table.rows,
            self._slots.present,
            plan.slots,
            plan.tokens,
            plan.draft_tokens,
            self._num_running,
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            self._slots.seen,
        )
        if fault != rules.NO_FAULT:
            entry = f" (entry {where}: slot {plan.slots[where]}, {plan.tokens[where]} tokens)" if where >= 0 else ""
            name = type(self.policy).__name__
            raise PlanFaultError(f"replica {self.index} at {now_s:.3f} s: {name} planned {_FAULTS[fault]}{entry}")

    def _execute(self, now_s: float, plan: StepPlan) -> float | None:
        """Give blocks, start requests, and compute how long the step takes; ``None`` when nothing could run."""
        totals = rules.start_step(
            self.view.table.rows,
            self._slots.held_blocks,
            self._running,
            self._num_running,
            plan.slots,
            plan.tokens,
            plan.draft_tokens,
            self.view.free_blocks,
            self._limits.block_size,
            self._slots.step_slots,
            self._slots.step_tokens,
            self._slots.step_drafts,
            self._slots.scratch,
        )
        started = totals[rules.NUM_RUNNING] + totals[rules.NUM_PREEMPTED] - self._num_running
        self._num_running = int(totals[rules.NUM_RUNNING])
        self.view.free_blocks = int(totals[rules.FREE_BLOCKS])
        self._recording.num_no_room += int(totals[rules.NO_ROOM])
        if started > 0:
            self._claim_prefixes(plan)
            self._num_waiting = rules.keep_waiting(self.view.table.rows, self._waiting, self._num_waiting)
        if totals[rules.NUM_PREEMPTED]:
            self._requeue(self._slots.scratch[: totals[rules.NUM_PREEMPTED]])
        self._shrink_cache()
        self._step_count = int(totals[rules.NUM_SEQS])
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
        )
        return self._begin(now_s, shape, plan.predicted_s)

    def _begin(self, now_s: float, shape: BatchShape, predicted_s: float) -> float:
        duration_s = self._factors.duration_s(now_s, self._batch_time.step_s(shape))
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
                self._num_running,
                self._num_waiting,
                used,
            )
        )
        return duration_s

    def finish_step(self, now_s: float) -> list[int]:
        """End the step that runs; returns the calls that finished in it."""
        rows = self.view.table.rows
        recording = self._recording
        num_finished = rules.finish_step(
            rows,
            self._slots.call_of,
            self._calls,
            self._arrivals_s,
            self._slots.step_slots,
            self._slots.step_tokens,
            self._slots.step_drafts,
            self._step_count,
            now_s,
            self._settings.seed,
            recording.token_s,
            recording.token_start,
            self._slots.scratch,
            self._slots.step_accepted,
        )
        self.busy = False
        if self._step_shape.draft_steps:
            self._tell_verified()
        self.policy.on_step_done(self._step_shape, now_s - self._step_start_s)
        return [self._finish(int(slot), now_s) for slot in self._slots.scratch[:num_finished].copy()]

    def _tell_verified(self) -> None:
        """Let the policy learn from the drafts of the step that ended."""
        accepted = self._slots.step_accepted[: self._step_count]
        known = accepted >= 0
        drafted, accepted = self._slots.step_drafts[: self._step_count][known], accepted[known]
        slots = self._slots.step_slots[: self._step_count][known]
        self._recording.num_drafted += int(drafted.sum())
        self._recording.num_accepted += int(accepted.sum())
        self.policy.on_verified(self.view.table.rows["class_index"][slots], drafted, accepted)

    def _finish(self, slot: int, now_s: float) -> int:
        rows = self.view.table.rows
        self._leave_running(slot)
        call = int(self._slots.call_of[slot])
        row = rows[slot]
        prompt, output = int(row["prompt_tokens"]), int(row["output_tokens"])
        record = self._recording.calls[call]
        record["output_tokens"] = output
        if row["status"] == Status.ADMITTED:
            record["admitted"] = 1
        if row["missed"]:
            self._recording.session_missed[int(self._calls["session"][call])] = True
        if output == self._true_length(call):
            record["outcome"] = rules.COMPLETED
            record["done_s"] = now_s
            self.policy.on_request_done(int(row["class_index"]), prompt, output)
        if self._cache is not None:
            self._cache.keep(int(self._calls["session"][call]), prompt + output - 1)
            self._shrink_cache()
        return self._remove(slot)

    def _leave_running(self, slot: int) -> None:
        self.view.free_blocks += rules.release(
            self.view.table.rows, self._slots.held_blocks, self._running, self._num_running, slot
        )
        self._num_running -= 1

    # ------------------------------------------------------------------------------------------------- side effects

    def _note_verdicts(self, plan: StepPlan) -> None:
        if len(plan.admitted):
            self._recording.calls["admitted"][self._slots.call_of[plan.admitted]] = 1
        if len(plan.demoted):
            self._recording.calls["demoted"][self._slots.call_of[plan.demoted]] = 1

    def _preempt(self, slots: SlotArray) -> None:
        rows = self.view.table.rows
        for slot in slots:
            if not rows["running"][slot]:
                raise PlanFaultError(f"replica {self.index}: preempts slot {slot}, which holds no KV")
            self._leave_running(int(slot))
            rows["computed_tokens"][slot] = 0
            rows["cached_tokens"][slot] = 0
        self._requeue(slots)

    def _requeue(self, slots: SlotArray) -> None:
        """Put preempted requests at the head of the waiting list, the last victim first, as vLLM does."""
        self._recording.num_preemptions += len(slots)
        self._recording.calls["preemptions"][self._slots.call_of[slots]] += 1
        queue = np.concatenate((slots[::-1], self._waiting[: self._num_waiting]))
        self._num_waiting = len(queue)
        if len(queue) > len(self._waiting):
            self._waiting = np.empty(2 * len(queue), dtype=np.int64)
        self._waiting[: len(queue)] = queue

    def _reject(self, slots: SlotArray) -> None:
        rows = self.view.table.rows
        for slot in slots:
            if rows["running"][slot]:
                raise PlanFaultError(f"replica {self.index}: rejects slot {slot}, which is running")
            self._recording.calls["outcome"][self._slots.call_of[slot]] = rules.REJECTED
        gone = np.isin(self._waiting[: self._num_waiting], slots)
        kept = self._waiting[: self._num_waiting][~gone]
        self._waiting[: len(kept)] = kept
        self._num_waiting = len(kept)
        for slot in slots:
            if self._cache is not None:
                self._cache.give_up(int(self._calls["session"][self._slots.call_of[slot]]))
            self._remove(int(slot))

    def _claim_prefixes(self, plan: StepPlan) -> None:
        """Hand cached blocks to the calls that started on them."""
        if self._cache is None or not self._cache.num_expected:
            return
        rows = self.view.table.rows
        for slot in plan.slots:
            if rows["running"][slot] and rows["cached_tokens"][slot]:
                call = self._slots.call_of[slot]
                session = int(self._calls["session"][call])
                if self._cache.start(session):
                    self._recording.calls["cached_tokens"][call] = rows["cached_tokens"][slot]

    def _shrink_cache(self) -> None:
        """Evict what the blocks in use leave no room for; waiting calls lose the prefix they counted on."""
        if self._cache is None or self._cache.num_blocks <= self.view.free_blocks:
            return
        for slot in self._cache.evict(self.view.free_blocks):
            self.view.table.rows["cached_tokens"][slot] = 0

    def die(self) -> tuple[list[int], list[int]]:
        """Stop for good; returns the calls that had not begun to stream, and those that had (lost)."""
        self.alive = False
        self.busy = False
        rows = self.view.table.rows
        unseen = np.asarray(self._unseen, dtype=np.int64)
        slots = np.concatenate((self._running[: self._num_running], self._waiting[: self._num_waiting], unseen))
        again = [int(self._slots.call_of[slot]) for slot in slots if rows["output_tokens"][slot] == 0]
        lost = [int(self._slots.call_of[slot]) for slot in slots if rows["output_tokens"][slot] > 0]
        for call in lost:
            self._recording.calls["outcome"][call] = rules.LOST
        self._num_running = self._num_waiting = 0
        self._unseen = []
        return again, lost
