"""One step: propose -> steer -> vLLM's ``schedule()`` -> commit.

``propose`` brings the table up to date and plans; it changes nothing that counts. ``steer`` lets vLLM make the planned
batch. ``commit`` writes statuses and promises for what really ran. A fault in any of them costs the step its plan, not
more (:mod:`slos_serve.vllm_plugin.guard`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.request import SlotArray
from slos_serve.perf.step_time import alone_s
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.vllm_plugin import compat, compat_counters
from slos_serve.vllm_plugin.engine_view import EngineLimits
from slos_serve.vllm_plugin.front.link import PROMISED_KEY, OutcomeLink
from slos_serve.vllm_plugin.guard import Guard
from slos_serve.vllm_plugin.kv_loads import KVLoads
from slos_serve.vllm_plugin.learning import StepLearner
from slos_serve.vllm_plugin.prefix_hits import PrefixHits
from slos_serve.vllm_plugin.publish import EnginePublisher
from slos_serve.vllm_plugin.queues import Queues
from slos_serve.vllm_plugin.recorder import GAUGES_EVERY, QueueCounts, Recorder, StepRecord
from slos_serve.vllm_plugin.request_book import RequestBook
from slos_serve.vllm_plugin.steering import HiddenRequests, Selection, SteeredStep, select
from slos_serve.vllm_plugin.telemetry import Telemetry
from slos_serve.vllm_plugin.tracked import Tracked

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

MOST_FORBEARANCE = 64
# A plan that takes less of its step than this is in time, whatever the limit.
PLAN_SHARE_OF_STEP = 0.1


@dataclass(slots=True)
class Proposal:
    """A step that is planned and not made yet.

    Attributes:
        view: what the plan was made from.
        plan: the plan.
        chosen: what of it vLLM would accept now.
        plan_s: seconds that it took.
        busy_s: processor seconds of them.
        end_s: when the step would end.
    """

    view: EngineView
    plan: StepPlan
    chosen: Selection
    plan_s: float
    busy_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Reporting:
    """Where the controller tells what happened.

    Attributes:
        recorder: writes metrics and events, in the telemetry thread.
        telemetry: that thread's queue.
        publisher: tells routers; ``None`` without any.
        front: tells the API process of promises before their first tokens come; ``None`` without one.
    """

    recorder: Recorder
    telemetry: Telemetry
    publisher: EnginePublisher | None
    front: OutcomeLink | None = None


class StepController:
    """Steers one scheduler.

    Args:
        scheduler: vLLM's.
        policy: plans steps.
        guard: counts faults.
        reporting: where metrics, events and publications go.
        clock_s: the clock of every time that is compared.
        plan_limit_s: processor time that a plan may take, whatever its step takes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        policy: SLOsServePolicy,
        guard: Guard,
        reporting: Reporting,
        clock_s: Callable[[], float],
        plan_limit_s: float,
    ) -> None:
        self.scheduler = scheduler
        self.policy = policy
        self.guard = guard
        self.recorder = reporting.recorder
        self.telemetry = reporting.telemetry
        self.publisher = reporting.publisher
        self.front = reporting.front
        self.book = RequestBook(advances_alone=compat_counters.advances_alone(scheduler))
        self.queues = Queues(scheduler, self.book)
        self.hits = PrefixHits(scheduler)
        self.loads = KVLoads(self.book, lambda tokens, done: alone_s(policy.planner.coefficients, tokens, done))
        self.limits = EngineLimits(scheduler)
        self.learner = StepLearner(policy, self.book)
        self.hidden = HiddenRequests()
        self._clock_s = clock_s
        self._plan_limit_s = plan_limit_s
        self._fallback: str | None = None
        self._owes_stock_step = False
        self._passed_over: set[str] = set()
        # Tickets and ranks of promises that the API process has not heard of.
        self._promised: list[tuple[int, int]] = []
        self._steps = 0

    def now_s(self) -> float:
        """Time on the scheduler's clock."""
        return self._clock_s()

    # A step ---------------------------------------------------------------------------------------------------

    def schedule(self, stock: Callable[[], SchedulerOutput], throttle_prefills: bool) -> SchedulerOutput:
        """Make one step, planned where it can be."""
        entered_s = time.perf_counter()
        self._fallback = None
        proposal = None
        if self.guard.run("propose", self._may_plan, throttle_prefills):
            proposal = self.guard.run("propose", self._propose)
            if proposal is None and self._fallback is None:
                self._fallback = "propose"
        with ExitStack() as stack:
            if proposal is not None and not self._steer(stack, proposal):
                proposal = None
            ready_s = time.perf_counter()
            output = stock()
            made_s = time.perf_counter()
        if self.book.num_slo or proposal is not None:
            if not self.guard.run("commit", self._commit, output, proposal, ready_s - entered_s, made_s):
                self._look_anew()  # what was written down of the step may be half of it
        elif self.publisher is not None:
            self.guard.run("publish", self._publish_when_due)
        if proposal is None and not self.guard.run("look", self._stock_step_made, output):
            self._look_anew()
        return output

    def _stock_step_made(self, output: SchedulerOutput) -> bool:
        """Take in what vLLM's own step did to its queues; False where they are to be scanned anew.

        Without that each publication would scan them, though nobody has a promise: they may hold ten thousand requests.
        """
        if self._fallback in ("propose", "steer") or self.book.sessions or self.scheduler.connector is not None:
            return False
        preempted = getattr(output, "preempted_req_ids", None)
        if preempted is None or preempted:  # not told by every vLLM
            return False
        self.book.read_anew()
        began = (*(new.req_id for new in output.scheduled_new_reqs), *output.scheduled_cached_reqs.resumed_req_ids)
        for tracked in (self.book.by_id[key] for key in began if key in self.book.by_id):
            self.queues.left(tracked)
            self.hits.forget(tracked)
        return True

    def _look_anew(self) -> None:
        """It is not known what a step was."""
        self.queues.changed()
        self.book.read_anew()

    def _may_plan(self, throttle_prefills: bool) -> bool:
        """Whether this step is to be planned: a promise is there, and nothing speaks for the engine's own order."""
        scheduler, guard = self.scheduler, self.guard
        if not self.book.num_slo or not guard.armed or compat.is_paused(scheduler):
            return False
        if compat.defers_prefills(scheduler, throttle_prefills):
            return False
        if guard.resting:
            guard.resting -= 1
            self._fall_back("resting")
            return False
        if self._owes_stock_step:
            self._owes_stock_step = False
            self._fall_back("unserved")
            return False
        return True

    def _fall_back(self, kind: str) -> None:
        self._fallback = kind
        self.guard.count(kind)

    def _propose(self) -> Proposal | None:
        wall_s, busy_s = time.perf_counter(), time.thread_time()
        seen_s = self._clock_s()
        start_s = self.learner.next_start_s(seen_s)
        view = self.look(start_s)
        plan = self.policy.plan(start_s, view)
        if self.publisher is not None:
            self.publisher.after_plan(start_s, view, plan, seen_until_s=seen_s)
        chosen = select(self.scheduler, plan, self.book, self.limits.needs, self.hits.loads())
        # Processor time: a plan is not to blame for a core that something else kept busy.
        wall_s, busy_s = time.perf_counter() - wall_s, time.thread_time() - busy_s
        proposal = Proposal(view, plan, chosen, wall_s, busy_s, start_s + plan.predicted_s)
        if not (chosen.run or chosen.start or chosen.loads):
            # Nobody can run now (last tokens in flight, cadence, nothing fits): vLLM may know better.
            self._fallback = "empty_plan"
            return None
        return proposal

    def look(self, start_s: float) -> EngineView:
        """Bring the table up to date with vLLM's counters and look at the engine."""
        book, queues = self.book, self.queues
        self.loads.withdraw()
        running = book.sync_running(self.scheduler, start_s)
        waiting = queues.look()
        self.hits.refresh(book.table.rows, queues.startable)
        if book.sessions:
            sessions = [one for one in book.sessions.values() if compat.holds_slot(one.request)]
            # To the plan they run: they hold their KV and a worker's slot.
            slots = book.sync_sessions(sessions)
            running = np.concatenate((running, slots))
            waiting = waiting[~np.isin(waiting, slots)]
        if self.scheduler.connector is not None:
            waiting = np.concatenate((self._asked(waiting), self._loading(start_s)))
        return self.limits.view(book.table, running, waiting)

    def _asked(self, waiting: SlotArray) -> SlotArray:
        """Those of ``waiting`` that may start without a load and of which the connector has been asked."""
        hits, startable = self.hits, self.queues.startable
        return np.array([slot for slot in waiting.tolist() if not hits.is_unasked(startable[slot])], dtype=np.int64)

    def _loading(self, start_s: float) -> SlotArray:
        """Promised requests whose KV a connector loads, or is to load, before they can start."""
        now_s = self._clock_s()
        self.loads.learn(self.queues.blocked.values(), now_s)
        within, each_s = self.hits.loads_within_step(), self.learner.loaded_s_each
        return self.loads.show(self.hits.loads(), within, each_s, start_s, now_s)

    def _steer(self, stack: ExitStack, proposal: Proposal) -> bool:
        """Enter the steered state; False when that failed and the lists are as they were."""
        context = SteeredStep(self.scheduler, proposal.chosen, self._clock_s(), self.hidden, self._steering_fault)
        try:
            stack.enter_context(context)
        except Exception as error:
            self.guard.fault("steer", error)
            self._fallback = "steer"
            return False
        return True

    def _steering_fault(self, kind: str, error: Exception) -> None:
        """Putting vLLM's lists back failed; they were put together from the requests' states."""
        self.guard.fault(kind, error)
        self._look_anew()

    def _commit(self, output: SchedulerOutput, proposal: Proposal | None, before_s: float, made_s: float) -> bool:
        """Write down what the step was; the lists are vLLM's own again. True once all of it is written."""
        now_s = self._clock_s()
        ran = self._ran(output, proposal)
        shape, predicted_s = self.learner.scheduled(output, ran, now_s, None if proposal is None else proposal.plan)
        if proposal is not None:
            compat.note_waiting(self.scheduler)
            self._note_moves(proposal.chosen, now_s)
            self._commit_plan(proposal, ran)
            self._note_unserved(proposal.chosen, output)
            limit_s = max(self._plan_limit_s, PLAN_SHARE_OF_STEP * proposal.plan.predicted_s)
            in_time = proposal.busy_s <= limit_s
            if not in_time:
                self.guard.overran(proposal.busy_s, limit_s)
            self.guard.planned(in_time)
        elif self.publisher is not None:
            self._publish_when_due()
        self._steps += 1
        plan = proposal.plan if proposal is not None else None
        record = StepRecord(
            plan_s=0.0 if proposal is None else proposal.plan_s,
            added_s=before_s + time.perf_counter() - made_s,
            shape=shape,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.queues),
            held=0 if plan is None else int(np.count_nonzero(plan.held_reasons == Reason.HELD_AHEAD)),
            preempted=0 if plan is None else len(plan.preempt),
            predicted_s=predicted_s,
            fallback=self._fallback,
            scheduled=output.num_scheduled_tokens,
            drafted=output.scheduled_spec_decode_tokens,
        )
        self.telemetry.post(self.recorder.step, record, time.time())
        if self._steps % GAUGES_EVERY == 0:
            self.post_gauges()
        return True

    def _ran(self, output: SchedulerOutput, proposal: Proposal | None) -> SlotArray:
        """Rows of a step's requests, in vLLM's order: those selected, in their order, where all of them ran.

        With a connector a request that was to load may start instead of one that was to start.
        """
        ran = output.num_scheduled_tokens
        may_load = self.scheduler.connector is not None
        if proposal is not None and not may_load and len(ran) == len(proposal.chosen.slots):
            return proposal.chosen.slots
        return self.book.slots_of(ran)

    def _commit_plan(self, proposal: Proposal, ran: SlotArray) -> None:
        """Make the promises of a plan, for what really ran."""
        made = self.book.note(proposal.plan, ran)
        self._promised += made
        self.policy.commit(proposal.plan, proposal.view, ran)
        self.book.fall_back(proposal.plan.demoted, proposal.end_s)

    def _note_moves(self, chosen: Selection, now_s: float) -> None:
        """Tell the queues who started, whose KV is being loaded and who was preempted."""
        book = self.book
        for tracked in book.known_of(chosen.started):
            self.queues.left(tracked)
            self.hits.forget(tracked)
        loading = book.known_of(chosen.loading)
        for tracked in loading:
            self.queues.left(tracked)
            self.queues.entered(tracked)
        self.loads.begun(loading, now_s)
        if chosen.preempted:
            several = book.known_of(chosen.preempted)
            self.queues.preempted(several)
            self.hits.waits(several)

    def _note_unserved(self, chosen: Selection, output: SchedulerOutput) -> None:
        """A request that is planned again and again and never scheduled gets a step in the engine's own order."""
        ran, book = output.num_scheduled_tokens, self.book
        all_ran = len(ran) == len(chosen.run) + len(chosen.start)
        if all_ran and len(chosen.loading) >= len(chosen.loads) and not chosen.unfit_loads:
            if self._passed_over:
                self._passed_over = {key for key in self._passed_over if key not in ran and key in book.by_id}
            return
        for tracked in book.known_of((*chosen.run, *chosen.start, *chosen.loads, *chosen.unfit_loads)):
            request = tracked.request
            if request.request_id in ran or not (request.status.name == "RUNNING" or compat.may_start(request)):
                self._passed_over.discard(request.request_id)
                tracked.unserved_plans = 0
                continue
            if request.request_id not in self._passed_over:
                tracked.unserved_plans = 0
            self._passed_over.add(request.request_id)
            tracked.unserved_plans += 1
            if tracked.unserved_plans >= tracked.forbearance:
                tracked.unserved_plans = 0
                tracked.forbearance = min(2 * tracked.forbearance, MOST_FORBEARANCE)
                self._owes_stock_step = True

    def forget(self, tracked: Tracked) -> None:
        """A request has left the engine."""
        self.hits.forget(tracked)
        self.queues.left(tracked)
        self.loads.forget(tracked)

    # Beside steps ---------------------------------------------------------------------------------------------

    def tell(self) -> None:
        """Tell the API process and routers what a step brought: its batch is with the workers."""
        promised, self._promised = self._promised, []
        if promised and self.front is not None:
            self.front.write({PROMISED_KEY: promised})
        if self.publisher is not None:
            self.publisher.send()

    def _publish_when_due(self) -> None:
        """Steps without a plan publish too, when it is time."""
        assert self.publisher is not None
        now_s = self._clock_s()
        if self.publisher.due(now_s):
            self.publisher.unplanned(now_s, self.look(now_s))

    def publish_idle(self) -> None:
        """No step follows the last request, so that it left is published at once."""
        if self.publisher is not None:
            now_s = self._clock_s()
            self.publisher.idle(now_s, self.look(now_s))

    def post_gauges(self) -> None:
        """Hand the gauges over to the telemetry thread."""
        book = self.book
        slots = np.fromiter(book.by_slot, dtype=np.int64, count=len(book.by_slot))
        rows = book.table.rows
        running, status = rows["running"][slots] == 1, rows["status"][slots]
        inside = np.bincount(status[running], minlength=3).tolist()
        outside = np.bincount(status[~running], minlength=3).tolist()
        counts = QueueCounts(tuple(inside), tuple(outside))
        dropped = self.telemetry.dropped
        self.telemetry.post(self.recorder.gauges, counts, dict(self.guard.counts), self.guard.armed, dropped)

    def done(self, output: SchedulerOutput) -> None:
        """A step's tokens have come."""
        if not output.total_num_scheduled_tokens:
            return
        if self.publisher is not None:
            self.publisher.step_done()
        timed = self.learner.done(output, self._clock_s())
        if not self.scheduler.requests:
            self.learner.rests()
        if timed is not None:
            shape, duration_s = timed
            self.telemetry.post(self.recorder.step_done, shape, duration_s, self.policy.correction.factor, time.time())
