"""One engine in virtual time: a policy is asked for a step, the step runs, again.

Assumes what a real engine gives a scheduler: it is asked for the next step when the last one ended, sees every token
produced so far, and does not know how long an answer will be. Output lengths stay in the workload; the request table
holds only ``max_tokens`` and a forecast. Who runs and who waits is :mod:`slos_serve.sim.engine_state`'s.
"""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import SlotArray, Status
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.policies.base import Policy
from slos_serve.sim import step as rules
from slos_serve.sim.engine_state import EngineState
from slos_serve.sim.faults import PlanFaultError, StuckError
from slos_serve.sim.limits import EngineLimits, ReplicaSettings
from slos_serve.sim.model_error import StepFactors
from slos_serve.sim.parts import WHOLE, Part
from slos_serve.sim.recording import Recording
from slos_serve.sim.tasks import SimTasks

# A replica that plans nothing is asked again after this long, this often at most before the run is called stuck.
IDLE_TICK_S = 0.005
MAX_EMPTY_PLANS = 2_000


class Replica:
    """Requests in an engine and their progress. Times are virtual seconds.

    Attributes:
        index: position among the cluster's replicas.
        busy: a step is executing.
        alive: False after :meth:`die`.
    """

    def __init__(
        self,
        index: int,
        policy: Policy,
        batch_time: BatchTimeModel,
        limits: EngineLimits,
        recording: Recording,
        settings: ReplicaSettings,
        tasks: SimTasks | None = None,
    ) -> None:
        """``tasks``: shared with other replicas."""
        self.index = index
        self.policy = policy
        self.busy = False
        self.alive = True
        self._batch_time = batch_time
        self._limits = limits
        self._recording = recording
        self._settings = settings
        tasks = SimTasks(recording, batch_time) if tasks is None else tasks
        self._state = EngineState(limits, recording, tasks, settings.is_apart, settings.oracle_lengths)
        self._state.view.plan_ahead = settings.plan_ahead
        self._offers_weaker = any(slo_class.otherwise for slo_class in recording.workload.classes)
        self._factors = StepFactors(settings.error, settings.seed, index)
        self._empty_plans = 0
        self._unseen: list[int] = []
        self._slot_of: dict[int, int] = {}
        self._came: list[int] = []
        self._step_count = 0
        self._step_shape = BatchShape(0)
        self._step_start_s = 0.0

    # ------------------------------------------------------------------------------------------------- requests

    @property
    def view(self) -> EngineView:
        """What the policy sees."""
        return self._state.view

    @property
    def num_requests(self) -> int:
        """Running and waiting, those that the policy has not seen included."""
        return self.num_running + self.num_waiting + len(self._unseen)

    @property
    def num_running(self) -> int:
        """Requests that hold KV."""
        return self._state.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that hold none, as far as the policy has seen them."""
        return self._state.num_waiting

    @property
    def slots(self) -> SlotArray:
        """Slots of all its requests, those that the policy has not seen included."""
        return np.flatnonzero(self._state.slots.call_of >= 0)

    def fits(self, call: int) -> bool:
        """Whether the call's longest form could ever be held."""
        row = self._recording.workload.calls[call]
        tokens = int(row["prompt_tokens"]) + int(row["output_tokens"])
        return -(-tokens // self._limits.block_size) <= self._limits.total_blocks

    def cached_tokens(self, call: int) -> int:
        """Prompt tokens that this replica's prefix cache would supply now."""
        return self._state.cached_tokens(call)

    def add(self, call: int, arrival_s: float, part: Part = WHOLE) -> int:
        """Enter a call that arrived at ``arrival_s``; returns its slot.

        Args:
            call: row of the workload.
            arrival_s: when its client sent it; promises count from there.
            part: what of it this replica serves.
        """
        slot = self._state.enter(call, arrival_s, part)
        if part.comes_s > 0.0:
            self._slot_of[call] = slot
        if self._settings.plan_ahead and self.busy:
            self._unseen.append(slot)
        else:
            self._state.wait(slot)
        record = self._recording.calls[call]
        record["arrival_s"] = arrival_s
        record["replica"] = self.index
        return slot

    def kv_came(self, call: int) -> None:
        """The KV of a call that entered with ``comes_s`` is there: it may run."""
        slot = self._slot_of.pop(call)
        if self._settings.plan_ahead and self.busy:
            self._came.append(slot)
        else:
            self._state.came(slot)

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
        came, self._came = self._came, []
        end_s = self._plan_step(now_s)
        for slot in unseen:
            self._state.wait(slot)
        for slot in came:
            self._state.came(slot)
        return end_s

    def _plan_step(self, now_s: float) -> float | None:
        state = self._state
        if state.num_running + state.num_waiting == 0:
            return None
        plan = self.policy.plan(now_s, state.show(now_s))
        try:
            if len(plan.preempt):
                state.preempt(plan.preempt)
            if len(plan.rejected):
                state.reject(plan.rejected)
        except PlanFaultError as error:
            raise self._fault(now_s, str(error)) from error
        if len(plan.slots) == 0:
            self._commit(now_s, plan, plan.slots)
            self._idle(now_s)
            return None
        broken = state.check(plan)
        if broken:
            raise self._fault(now_s, f"planned {broken}")
        duration_s = self._execute(now_s, plan)
        return None if duration_s is None else now_s + duration_s

    def _fault(self, now_s: float, what: str) -> PlanFaultError:
        return PlanFaultError(f"replica {self.index} at {now_s:.3f} s: {type(self.policy).__name__} {what}")

    def _idle(self, now_s: float) -> None:
        if self.num_requests > self._state.num_coming:
            self._recording.num_empty_plans += 1
            self._empty_plans += 1
            if self._empty_plans > MAX_EMPTY_PLANS:
                raise StuckError(
                    f"replica {self.index} at {now_s:.3f} s: {type(self.policy).__name__} planned nothing "
                    f"{MAX_EMPTY_PLANS} times running, with {self.num_running} running and {self.num_waiting} waiting"
                )

    def _execute(self, now_s: float, plan: StepPlan) -> float | None:
        """Give blocks, start requests, and compute how long the step takes; ``None`` when nothing could run."""
        totals = self._state.start(plan)
        self._recording.num_no_room += totals[rules.NO_ROOM]
        self._recording.num_recomputed += totals[rules.RECOMPUTED]
        self._step_count = totals[rules.NUM_SEQS]
        self._commit(now_s, plan, self._state.slots.step_slots[: self._step_count])
        if self._step_count == 0:
            self._idle(now_s)
            return None
        self._empty_plans = 0
        shape = BatchShape(
            totals[rules.NEW_TOKENS],
            totals[rules.CONTEXT_TOKENS],
            totals[rules.QUAD_TOKENS2],
            self._step_count,
            totals[rules.DRAFT_STEPS],
            totals[rules.DRAFT_TOKENS],
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
        finished = self._state.advance(self._step_count, now_s, self._settings.seed)
        self.busy = False
        if self._step_shape.draft_steps:
            self._tell_verified()
        self.policy.on_step_done(self._step_shape, now_s - self._step_start_s)
        return [self._finish(slot, now_s) for slot in finished]

    def _tell_verified(self) -> None:
        """Let the policy learn from the drafts of the step that ended."""
        arrays, count = self._state.slots, self._step_count
        accepted = arrays.step_accepted[:count]
        known = accepted >= 0
        drafted, accepted = arrays.step_drafts[:count][known], accepted[known]
        slots = arrays.step_slots[:count][known]
        self._recording.num_drafted += int(drafted.sum())
        self._recording.num_accepted += int(accepted.sum())
        self.policy.on_verified(self.view.table.rows["class_index"][slots], drafted, accepted)

    def _finish(self, slot: int, now_s: float) -> int:
        call, whole = self._state.finish(slot, now_s)
        if whole:
            row = self._state.calls[call]
            self.policy.on_request_done(int(row["class_index"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
        return call

    def _commit(self, now_s: float, plan: StepPlan, ran: SlotArray) -> None:
        """Let the policy make its promises, and record them; who lost one asks for a weaker one, where there is any."""
        self.policy.commit(plan, self.view, ran)
        if not len(plan.admitted) and not len(plan.demoted):
            return
        calls, call_of, status = self._recording.calls, self._state.slots.call_of, self.view.table.rows["status"]
        promised = plan.admitted[status[plan.admitted] == Status.ADMITTED]
        self._state.note_promises(promised)
        calls["demoted"][call_of[plan.demoted]] = 1
        if len(plan.demoted) and self._offers_weaker:
            self._state.fall_back(plan.demoted, now_s + plan.predicted_s, self._batch_time)

    def die(self) -> tuple[list[int], list[int]]:
        """Stop for good; returns the calls that had not begun to stream, and those that had (lost)."""
        self.alive = False
        self.busy = False
        unseen, self._unseen = self._unseen, []
        return self._state.lose_all(unseen)
