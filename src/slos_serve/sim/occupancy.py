"""Who occupies an engine: its requests, the KV they hold, what its prefix cache keeps, and who waits.

Everything here happens between steps: requests enter, are preempted, rejected or leave. Steps are
:mod:`slos_serve.sim.replica`'s.
"""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView
from slos_serve.core.request import RequestTable, SlotArray, Status
from slos_serve.core.slo import SLOClass
from slos_serve.sim import step as rules
from slos_serve.sim.faults import PlanFaultError
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.prefix_cache import PrefixCache
from slos_serve.sim.recording import Recording
from slos_serve.sim.slots import Slots


class Occupancy:
    """Requests in an engine, running and waiting. Times are virtual seconds.

    Attributes:
        view: what the policy sees.
        slots: what it does not see of each row.
        running, num_running: slots that hold KV, [num_running].
        waiting, num_waiting: slots that hold none, in the engine's order, [num_waiting].
        calls: rows of the workload as this engine runs them.
        arrivals_s: when their clients sent them, [calls].
    """

    def __init__(
        self, limits: EngineLimits, recording: Recording, prefill_only: bool = False, oracle_lengths: bool = False
    ) -> None:
        """``prefill_only``: answers end with their first token; ``oracle_lengths``: the policy is told their length."""
        self.calls = recording.workload.calls
        if prefill_only:
            self.calls = self.calls.copy()
            self.calls["output_tokens"] = 1
        self.arrivals_s = np.ascontiguousarray(recording.calls["arrival_s"])
        self.running, self.num_running = np.empty(limits.max_num_seqs + 1, dtype=np.int64), 0
        self.waiting, self.num_waiting = np.empty(64, dtype=np.int64), 0
        self._limits = limits
        self._recording = recording
        self._classes: tuple[SLOClass, ...] = recording.workload.classes
        self._oracle_lengths = oracle_lengths
        self._cache = PrefixCache(limits.block_size) if limits.prefix_cache else None
        table = RequestTable(64)
        self.slots = Slots(len(table.rows))
        self.view = EngineView(
            table=table,
            running=self.running[:0],
            waiting=self.waiting[:0],
            free_blocks=limits.total_blocks,
            total_blocks=limits.total_blocks,
            block_size=limits.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )

    def show(self) -> EngineView:
        """The view, with the lists as they are now."""
        self.view.running = self.running[: self.num_running]
        self.view.waiting = self.waiting[: self.num_waiting]
        return self.view

    # ------------------------------------------------------------------------------------------------- enter

    def cached_tokens(self, call: int) -> int:
        """Prompt tokens that the prefix cache would supply now."""
        if self._cache is None:
            return 0
        return self._cache.peek(int(self.calls["session"][call]), int(self.calls["prompt_tokens"][call]))

    def enter(self, call: int, arrival_s: float, tokens_done: int, output_tokens: int) -> int:
        """A call's slot in the table; it is in no list yet (see :meth:`Replica.add` for what the arguments mean)."""
        row = self.calls[call]
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
            hint_tokens=self._true_length(call) if self._oracle_lengths else 0,
            cached_tokens=cached,
        )
        self.slots.fit(len(table.rows))
        self.slots.enter(slot, call)
        self.arrivals_s[call] = arrival_s
        if output_tokens:
            self._take_over(slot, call, output_tokens)
        if self._cache is not None and cached and not tokens_done:
            self._cache.expect(session, slot)
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
        row["stage_start_s"] = self.arrivals_s[call] + float(times[0])
        row["last_token_s"] = self.arrivals_s[call] + float(times[-1])

    def wait(self, slot: int) -> None:
        """Put a slot at the end of the waiting list."""
        if self.num_waiting == len(self.waiting):
            self.waiting = np.concatenate((self.waiting, np.empty_like(self.waiting)))
        self.waiting[self.num_waiting] = slot
        self.num_waiting += 1

    # ------------------------------------------------------------------------------------------------- a plan's wishes

    def preempt(self, slots: SlotArray) -> None:
        """Take the KV of running requests away; they wait and begin anew.

        Raises:
            PlanFaultError: one of them holds none.
        """
        rows = self.view.table.rows
        for slot in slots:
            if not rows["running"][slot]:
                raise PlanFaultError(f"preempts slot {slot}, which holds no KV")
            self._leave_running(int(slot))
            rows["computed_tokens"][slot] = 0
            rows["cached_tokens"][slot] = 0
        self._requeue(slots)

    def _requeue(self, slots: SlotArray) -> None:
        """Put preempted requests at the head of the waiting list, the last victim first, as vLLM does."""
        self._recording.num_preemptions += len(slots)
        self._recording.calls["preemptions"][self.slots.call_of[slots]] += 1
        queue = np.concatenate((slots[::-1], self.waiting[: self.num_waiting]))
        self.num_waiting = len(queue)
        if len(queue) > len(self.waiting):
            self.waiting = np.empty(2 * len(queue), dtype=np.int64)
        self.waiting[: len(queue)] = queue

    def reject(self, slots: SlotArray) -> None:
        """Turn waiting requests away.

        Raises:
            PlanFaultError: one of them is running.
        """
        rows = self.view.table.rows
        for slot in slots:
            if rows["running"][slot]:
                raise PlanFaultError(f"rejects slot {slot}, which is running")
            self._recording.calls["outcome"][self.slots.call_of[slot]] = rules.REJECTED
        gone = np.isin(self.waiting[: self.num_waiting], slots)
        kept = self.waiting[: self.num_waiting][~gone]
        self.waiting[: len(kept)] = kept
        self.num_waiting = len(kept)
        for slot in slots:
            if self._cache is not None:
                self._cache.give_up(int(self.calls["session"][self.slots.call_of[slot]]))
            self._remove(int(slot))

    # ------------------------------------------------------------------------------------------------- a step

    def after_start(self, slots: SlotArray, num_running: int, num_preempted: int, free_blocks: int) -> None:
        """What the start of a step changed: requests of ``slots`` that started, others that lost their KV to them.

        Args:
            slots: those of the step.
            num_running: requests that hold KV now.
            num_preempted: how many lost it; ``self.slots.scratch`` begins with them.
            free_blocks: KV blocks that are left.
        """
        started = num_running + num_preempted - self.num_running
        self.num_running = num_running
        self.view.free_blocks = free_blocks
        if started > 0:
            self._claim_prefixes(slots)
            self.num_waiting = rules.keep_waiting(self.view.table.rows, self.waiting, self.num_waiting)
        if num_preempted:
            self._requeue(self.slots.scratch[:num_preempted])
        self.shrink_cache()

    def _claim_prefixes(self, slots: SlotArray) -> None:
        """Hand cached blocks to the calls that started on them."""
        if self._cache is None or not self._cache.num_expected:
            return
        rows = self.view.table.rows
        for slot in slots:
            if rows["running"][slot] and rows["cached_tokens"][slot]:
                call = self.slots.call_of[slot]
                session = int(self.calls["session"][call])
                if self._cache.start(session):
                    self._recording.calls["cached_tokens"][call] = rows["cached_tokens"][slot]

    def shrink_cache(self) -> None:
        """Evict what the blocks in use leave no room for; waiting calls lose the prefix they counted on."""
        if self._cache is None or self._cache.num_blocks <= self.view.free_blocks:
            return
        for slot in self._cache.evict(self.view.free_blocks):
            self.view.table.rows["cached_tokens"][slot] = 0

    # ------------------------------------------------------------------------------------------------- leave

    def finish(self, slot: int, now_s: float) -> tuple[int, bool]:
        """A running request leaves; returns its call and whether the whole answer is there."""
        self._leave_running(slot)
        call = int(self.slots.call_of[slot])
        row = self.view.table.rows[slot]
        prompt, output = int(row["prompt_tokens"]), int(row["output_tokens"])
        session = int(self.calls["session"][call])
        record = self._recording.calls[call]
        record["output_tokens"] = output
        if row["status"] == Status.ADMITTED:
            record["admitted"] = 1
        whole = output == self._true_length(call)
        if whole:
            record["outcome"] = rules.COMPLETED
            record["done_s"] = now_s
        if self._cache is not None:
            self._cache.keep(session, prompt + output - 1)
            self.shrink_cache()
        self._remove(slot)
        return call, whole

    def _leave_running(self, slot: int) -> None:
        self.view.free_blocks += rules.release(
            self.view.table.rows, self.slots.held_blocks, self.running, self.num_running, slot
        )
        self.num_running -= 1

    def _remove(self, slot: int) -> None:
        """Free a slot that is in no list any more."""
        self.view.table.remove(slot)
        self.slots.leave(slot)

    def lose_all(self, unseen: list[int]) -> tuple[list[int], list[int]]:
        """The engine died; returns the calls that had not begun to stream, and those that had (lost)."""
        rows = self.view.table.rows
        entered = np.asarray(unseen, dtype=np.int64)
        slots = np.concatenate((self.running[: self.num_running], self.waiting[: self.num_waiting], entered))
        again = [int(self.slots.call_of[slot]) for slot in slots if rows["output_tokens"][slot] == 0]
        lost = [int(self.slots.call_of[slot]) for slot in slots if rows["output_tokens"][slot] > 0]
        for call in lost:
            self._recording.calls["outcome"][call] = rules.LOST
        self.num_running = self.num_waiting = 0
        return again, lost
