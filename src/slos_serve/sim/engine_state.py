"""State of one engine between steps: its requests, the KV they hold, what its prefix cache keeps, and who waits.

One object holds all of it. Requests enter, are preempted, rejected or leave here; a step changes the same arrays
through the kernels of :mod:`slos_serve.sim.step`. What the policy may see is :attr:`EngineState.view`.
"""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import RequestTable, SlotArray, Status
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.sim import step as rules
from slos_serve.sim.block_cache import empty_cache, look_up, with_room
from slos_serve.sim.faults import PlanFaultError
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.parts import Part
from slos_serve.sim.recording import Recording
from slos_serve.sim.slots import grown
from slos_serve.sim.tasks import SimTasks

_FAULTS = {
    rules.TOO_MANY_TOKENS: "more tokens than max_num_batched_tokens",
    rules.NO_TOKENS: "an entry without tokens",
    rules.BEYOND_END: "more tokens than the request has left to compute",
    rules.TWICE: "a slot twice",
    rules.TOO_MANY_SEQS: "more running requests than max_num_seqs",
    rules.UNKNOWN_SLOT: "a slot that holds no request",
    rules.WRONG_DRAFT: "draft tokens for a request that is not decoding",
}


class EngineState:
    """Requests in an engine, running and waiting. Times are virtual seconds.

    Attributes:
        view: what the policy sees.
        slots: what it does not see of each row.
        cache: its prefix cache.
        num_running, num_waiting: requests that hold KV, and that hold none.
        calls: rows of the workload as this engine runs them.
        arrivals_s: when their clients sent them, [calls].
    """

    def __init__(
        self,
        limits: EngineLimits,
        recording: Recording,
        tasks: SimTasks,
        is_apart: bool = False,
        oracle_lengths: bool = False,
    ) -> None:
        """``is_apart``: calls may come in parts; ``oracle_lengths``: the policy is told the length of their answers."""
        self.calls = recording.workload.calls.copy() if is_apart else recording.workload.calls
        self.arrivals_s = np.ascontiguousarray(recording.calls["arrival_s"])
        self._running, self.num_running = np.empty(limits.max_num_seqs + 1, dtype=np.int64), 0
        self._waiting, self.num_waiting = np.empty(64, dtype=np.int64), 0
        self._limits = limits
        self._recording = recording
        self._tasks = tasks
        self._classes = recording.workload.classes
        self._oracle_lengths = oracle_lengths
        self._prompts: set[int] = set()
        self._silent: set[int] = set()
        self._coming: dict[int, float] = {}
        table = RequestTable(64)
        self.slots = grown(None, len(table.rows))
        self.cache = empty_cache(recording.prefixes, limits.prefix_cache)
        self._make_room()
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

    def show(self, now_s: float) -> EngineView:
        """The view, with the lists and what is cached as they are now.

        A call whose KV is on its way is shown as one that cannot run, due earlier by what is left of the transfer.
        """
        view = self.view
        for slot, comes_s in self._coming.items():
            row = view.table.rows[slot]
            row["ttft_due_s"] = row["promised_ttft_due_s"] - max(comes_s - now_s, 0.0)
        view.running = self._running[: self.num_running]
        view.waiting = self._waiting[: self.num_waiting]
        if self.num_waiting:
            rules.look_up_waiting(view.table.rows, self.slots, self.cache, view.waiting, view.block_size)
        return view

    # ------------------------------------------------------------------------------------------------- enter

    def cached_tokens(self, call: int) -> int:
        """Prompt tokens that the prefix cache would supply now."""
        most = int(self.calls["prompt_tokens"][call]) - 1
        return look_up(self.cache, call, most, self._limits.block_size)[0]

    @property
    def num_coming(self) -> int:
        """Waiting calls whose KV is on its way."""
        return len(self._coming)

    def enter(self, call: int, arrival_s: float, part: Part) -> int:
        """A call's slot in the table; it is in no list yet (see :meth:`Replica.add` for what the arguments mean)."""
        if self.calls is not self._recording.workload.calls:
            self.calls["output_tokens"][call] = 1 if part.prompt_only else self._true_length(call)
        row = self.calls[call]
        slo_class = self._classes[int(row["class_index"])]
        table = self.view.table
        due = self._tasks.begin(call, arrival_s)
        answer_due_s = arrival_s + float(row["e2e_s"])
        answer_due_s = answer_due_s if due is None else min(answer_due_s, due.due_s)
        slot = table.add(
            arrival_s=arrival_s,
            prompt_tokens=int(row["prompt_tokens"]),
            max_tokens=1 if part.prompt_only else int(row["max_tokens"]),
            ttft_due_s=part.due_s if part.prompt_only else arrival_s + float(row["ttft_s"]),
            tpot_s=np.inf if part.prompt_only else float(row["tpot_s"]),
            answer_due_s=np.inf if part.prompt_only else answer_due_s,
            class_index=int(row["class_index"]),
            weight=slo_class.weight * (1.0 if due is None else due.weight),
            max_stall_s=slo_class.max_stall_ms / 1000.0,
            hint_tokens=self._true_length(call) if self._oracle_lengths else 0,
            cached_tokens=part.tokens_done or self.cached_tokens(call),
        )
        self.slots = grown(self.slots, len(table.rows))
        self.slots.call_of[slot] = call
        self.slots.brought[slot] = part.tokens_done
        self.slots.hit[slot] = self.slots.lost[slot] = 0
        self.arrivals_s[call] = arrival_s
        if part.prompt_only:
            self._prompts.add(slot)
        if not part.is_promise:
            self._silent.add(slot)
        if part.comes_s > 0.0:
            table.rows["blocked"][slot] = 1
            self._coming[slot] = part.comes_s
        if part.output_tokens:
            self._take_over(slot, call, part.output_tokens)
        return slot

    def came(self, slot: int) -> None:
        """The KV of a call that entered with ``comes_s`` is there."""
        if self._coming.pop(slot, None) is None:
            return
        row = self.view.table.rows[slot]
        row["blocked"], row["ttft_due_s"] = 0, row["promised_ttft_due_s"]

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
        if self.num_waiting == len(self._waiting):
            self._waiting = np.concatenate((self._waiting, np.empty_like(self._waiting)))
        self._waiting[self.num_waiting] = slot
        self.num_waiting += 1

    # ------------------------------------------------------------------------------------------------- a plan's wishes

    def preempt(self, slots: SlotArray) -> None:
        """Take the KV of running requests away; they wait and begin anew.

        Raises:
            PlanFaultError: one of them holds none.
        """
        rows, view = self.view.table.rows, self.view
        for slot in slots:
            if not rows["running"][slot]:
                raise PlanFaultError(f"preempts slot {slot}, which holds no KV")
            view.free_blocks += rules.preempt(
                rows, self.slots, self.cache, self._running, self.num_running, int(slot), view.block_size
            )
            self.num_running -= 1
        self._requeue(slots)

    def _make_room(self) -> None:
        """Give the cache's queue room for all running requests to leave; called when some have left."""
        self.cache = with_room(self.cache, len(self._running) * (self._recording.longest_path + 1))

    def note_promises(self, slots: SlotArray) -> None:
        """Slots were admitted: record the promises that this makes to clients."""
        told = [int(self.slots.call_of[slot]) for slot in slots.tolist() if slot not in self._silent]
        self._recording.calls["admitted"][told] = 1

    def _requeue(self, slots: SlotArray) -> None:
        """Put preempted requests at the head of the waiting list, the last victim first, as vLLM does."""
        self._make_room()
        self._recording.num_preemptions += len(slots)
        self._recording.calls["preemptions"][self.slots.call_of[slots]] += 1
        queue = np.concatenate((slots[::-1], self._waiting[: self.num_waiting]))
        self.num_waiting = len(queue)
        if len(queue) > len(self._waiting):
            self._waiting = np.empty(2 * len(queue), dtype=np.int64)
        self._waiting[: len(queue)] = queue

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
        waiting = self._waiting[: self.num_waiting]
        kept = waiting[~np.isin(waiting, slots)]
        self._waiting[: len(kept)] = kept
        self.num_waiting = len(kept)
        for slot in slots:
            self._remove(int(slot))

    def fall_back(self, slots: SlotArray, earliest_s: float, batch_time: BatchTimeModel) -> None:
        """Promises that were given up before a first token: ask for the class's next weaker one that can still be kept.

        Args:
            slots: whose promises were given up.
            earliest_s: when a first token can come at the earliest.
            batch_time: what a TTFT given as a slowdown is a multiple of.
        """
        rows, recording = self.view.table.rows, self._recording
        waits = (rows["output_tokens"][slots] == 0) & (rows["status"][slots] == Status.BEST_EFFORT)
        for slot in slots[waits].tolist():
            if slot in self._prompts:
                continue
            call = int(self.slots.call_of[slot])
            promises = self._classes[int(self.calls["class_index"][call])].promises
            arrival_s, rank = self.arrivals_s[call], int(recording.calls["rank"][call])
            for position in range(rank + 1, len(promises)):
                slo, prompt_tokens = promises[position].slo, int(self.calls["prompt_tokens"][call])
                promise = slo.ttft_s(batch_time.zero_load_s(prompt_tokens)), slo.tpot_s, slo.e2e_s
                if arrival_s + min(promise[0], promise[2]) >= earliest_s:
                    recording.calls["rank"][call], recording.weaker[call] = position, promise
                    self._ask_for(slot, arrival_s, promise, promises[position].weight)
                    break

    def _ask_for(self, slot: int, arrival_s: float, promise: tuple[float, float, float], weight: float) -> None:
        row = self.view.table.rows[slot]
        row["weight"] = weight
        row["ttft_due_s"] = row["promised_ttft_due_s"] = arrival_s + promise[0]
        row["tpot_s"] = row["promised_tpot_s"] = promise[1]
        row["answer_due_s"] = arrival_s + promise[2]
        row["status"] = Status.UNDECIDED

    # ------------------------------------------------------------------------------------------------- a step

    def check(self, plan: StepPlan) -> str:
        """What rule of the engine a plan breaks, in words; empty when none."""
        limits = self._limits
        fault, where = rules.check_plan(
            self.view.table.rows,
            self.slots,
            plan.slots,
            plan.tokens,
            plan.draft_tokens,
            self.num_running,
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
        )
        if fault == rules.NO_FAULT:
            return ""
        entry = f" (entry {where}: slot {plan.slots[where]}, {plan.tokens[where]} tokens)" if where >= 0 else ""
        return f"{_FAULTS[fault]}{entry}"

    def start(self, plan: StepPlan) -> list[int]:
        """Give blocks to a checked plan and start what is waiting; the totals of :func:`step.start_step`."""
        view = self.view
        totals: list[int] = rules.start_step(
            view.table.rows,
            self.slots,
            self.cache,
            self._running,
            self.num_running,
            (plan.slots, plan.tokens, plan.draft_tokens),
            view.free_blocks,
            view.block_size,
        ).tolist()
        num_running, num_preempted = totals[rules.NUM_RUNNING], totals[rules.NUM_PREEMPTED]
        started = num_running + num_preempted - self.num_running
        self.num_running = num_running
        view.free_blocks = totals[rules.FREE_BLOCKS]
        if started > 0:
            self.num_waiting = rules.keep_waiting(view.table.rows, self._waiting, self.num_waiting)
        if num_preempted:
            self._requeue(self.slots.scratch[:num_preempted].copy())
        return totals

    def advance(self, count: int, end_s: float, seed: int) -> list[int]:
        """The step of ``count`` requests ends; slots of those that finished."""
        recording, view = self._recording, self.view
        num_finished = rules.finish_step(
            view.table.rows,
            self.slots,
            self.cache,
            self.calls,
            self.arrivals_s,
            count,
            end_s,
            seed,
            recording.token_s,
            recording.token_start,
            view.block_size,
        )
        return [int(slot) for slot in self.slots.scratch[:num_finished]]

    # ------------------------------------------------------------------------------------------------- leave

    def finish(self, slot: int, now_s: float) -> tuple[int, bool]:
        """A running request leaves; returns its call and whether the whole answer is there."""
        rows, view = self.view.table.rows, self.view
        view.free_blocks += rules.release(
            rows, self.slots, self.cache, self._running, self.num_running, slot, view.block_size
        )
        self.num_running -= 1
        self._make_room()
        call = int(self.slots.call_of[slot])
        output = int(rows["output_tokens"][slot])
        record = self._recording.calls[call]
        record["output_tokens"] = output
        record["cached_tokens"] = max(int(record["cached_tokens"]), int(self.slots.hit[slot]))
        if rows["status"][slot] == Status.ADMITTED and slot not in self._silent:
            record["admitted"] = 1
        whole = output == self._true_length(call) and slot not in self._prompts
        if whole:
            record["outcome"] = rules.COMPLETED
            record["done_s"] = now_s
            self._tasks.ended(call, now_s, whole=True)
        self._remove(slot)
        return call, whole

    def _remove(self, slot: int) -> None:
        """Free a slot that is in no list any more."""
        self.view.table.remove(slot)
        self.slots.call_of[slot] = -1
        self._prompts.discard(slot)
        self._silent.discard(slot)
        self._coming.pop(slot, None)

    def lose_all(self, unseen: list[int]) -> tuple[list[int], list[int]]:
        """The engine died; returns the calls that had not begun to stream, and those that had (lost)."""
        rows = self.view.table.rows
        entered = np.asarray(unseen, dtype=np.int64)
        slots = np.concatenate((self._running[: self.num_running], self._waiting[: self.num_waiting], entered))
        again = [int(self.slots.call_of[slot]) for slot in slots if rows["output_tokens"][slot] == 0]
        lost = [int(self.slots.call_of[slot]) for slot in slots if rows["output_tokens"][slot] > 0]
        for call in lost:
            self._recording.calls["outcome"][call] = rules.LOST
        self.num_running = self.num_waiting = 0
        return again, lost
