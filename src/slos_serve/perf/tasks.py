"""When each call of a task is due, learnt from the tasks of its class that ended. No oracle: nobody knows how many
calls follow.

A call may take its share of what is left of the task's time. The share is learnt by the number of the call: of each
task that ended, how much of the work from that call on the call itself was. So it says at once how many calls follow
and how long they are. Where pauses count, those that are still to come are put aside first.

A call whose share is shorter than it needs is late. It gets what it needs, as long as the task has it, and more weight
in admission. Times are seconds on one clock of the caller's.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from slos_serve.core.tasks import MAX_TASK_CALLS, TaskPromise

MAX_TASKS = 100_000
MAX_TASKS_OF_TENANT = 10_000
# A task without a call for this long has ended.
IDLE_S, SWEEP_EVERY_S = 300.0, 1.0
# Calls of a task that are told apart when shares are learnt; later ones are taken for the last of these.
MOST_NUMBERS = 32
KEPT_TASKS, LEAST_TASKS = 64, 4
# How many calls a task is taken to have before any of its class has ended.
PRIOR_CALLS = 6
# How long its answer is taken to be.
PRIOR_TOKENS = 128.0
# What a call costs beside its output tokens, in such tokens.
TOKENS_OF_CALL = 16.0
# Which quantile of the learnt shares a call may take.
SHARE_QUANTILE = 0.5
# Of what is left, at least this much is for calls, however long the pauses were.
LEAST_FOR_CALLS = 0.2
# A call needs this many times what it takes alone on the engine.
NEEDED_OF_ALONE = 3.0
# Weight of a late call: how much it needs over what its share is, at most this.
MOST_LATE_WEIGHT = 4.0


class TaskKey(NamedTuple):
    """Names a task: sessions of different tenants are apart."""

    tenant: str
    session: str


@dataclass(frozen=True, slots=True)
class CallAsked:
    """A call that arrives.

    Attributes:
        task: what its task is promised; the first call's counts.
        class_index: whose tasks it is like.
        arrival_s: when it came.
        prompt_tokens, max_tokens: of its prompt, and at most of its answer.
        hint_tokens: the client's forecast of its answer; 0 without one.
        last: its client says that no other call of the task follows: it may take all that is left.
    """

    task: TaskPromise
    class_index: int
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    hint_tokens: int = 0
    last: bool = False


@dataclass(frozen=True, slots=True)
class CallDue:
    """When a call of a task is due.

    Attributes:
        key: its task.
        number: of the call in its task, from 1.
        due_s: when its last token is due.
        task_due_s: when the task is due, should no pause follow: a call that ends later has broken its promise.
        weight: what the call counts in admission, times its class's.
        serial: of the task, among all that the book has had.
    """

    key: TaskKey
    number: int
    due_s: float
    task_due_s: float
    weight: float
    serial: int


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """A task that ended.

    Attributes:
        key, class_index: see :class:`CallAsked`.
        calls: how many it had.
        spent_s: until its last answer ended, of what counts.
        kept: it was done in time; ``None`` where its client left before that was decided.
        promised: every call of it was promised its due time.
    """

    key: TaskKey
    class_index: int
    calls: int
    spent_s: float
    kept: bool | None
    promised: bool


@dataclass(slots=True)
class _Task:
    """A task under way; ``inside_s`` is time with a call in the server, of stretches that ended."""

    serial: int
    promise: TaskPromise
    class_index: int
    started_s: float
    last_s: float
    context_tokens: int = 0
    begun: int = 0
    in_flight: int = 0
    busy_since_s: float = 0.0
    inside_s: float = 0.0
    promised: bool = True
    aborted: bool = False
    is_last: bool = False
    tokens: list[int] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)

    def spent_s(self, now_s: float) -> float:
        if self.promise.pauses_count:
            return now_s - self.started_s
        return self.inside_s + (max(now_s - self.busy_since_s, 0.0) if self.in_flight else 0.0)


@dataclass(slots=True)
class _Seen:
    """Calls with one number, of the last tasks of a class: share of the work left, pauses that followed, tokens."""

    shares: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TASKS))
    pauses_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TASKS))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TASKS))


class TaskHistory:
    """What tasks of each class were like, by the number of the call."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], _Seen] = {}

    def learn(self, class_index: int, tokens: list[int], pauses_s: list[float]) -> None:
        """A task ended: output tokens of each of its calls, and the pause before each."""
        work_left, pauses_left_s = sum(tokens) + TOKENS_OF_CALL * len(tokens), sum(pauses_s)
        several = zip(tokens[:MOST_NUMBERS], pauses_s[:MOST_NUMBERS], strict=True)
        for number, (own, pause_s) in enumerate(several, 1):
            pauses_left_s -= pause_s
            seen = self._seen.setdefault((class_index, number), _Seen())
            seen.shares.append((own + TOKENS_OF_CALL) / work_left)
            seen.pauses_s.append(max(pauses_left_s, 0.0))
            seen.tokens.append(own)
            work_left -= own + TOKENS_OF_CALL

    def _of(self, class_index: int, number: int) -> _Seen | None:
        """Calls with this number; ``None`` where too few are known."""
        seen = self._seen.get((class_index, min(number, MOST_NUMBERS)))
        return seen if seen is not None and len(seen.shares) >= LEAST_TASKS else None

    def share(self, class_index: int, number: int) -> float:
        """Share of the rest of a task that its ``number``-th call is, itself counted."""
        seen = self._of(class_index, number)
        if seen is None:
            return 1.0 / max(PRIOR_CALLS - number + 1, 2)
        return float(np.quantile(seen.shares, SHARE_QUANTILE))

    def pauses_left_s(self, class_index: int, number: int) -> float:
        """Mean seconds of the pauses that follow the ``number``-th call."""
        seen = self._of(class_index, number)
        return 0.0 if seen is None else float(np.mean(seen.pauses_s))

    def tokens(self, class_index: int, number: int) -> float:
        """Mean output tokens of the ``number``-th call."""
        seen = self._of(class_index, number)
        return PRIOR_TOKENS if seen is None else float(np.mean(seen.tokens))


class TaskBook:
    """Tasks under way, and what ended ones taught.

    Args:
        zero_load_s: seconds that a prompt of so many tokens takes alone on the engine; of one: what a token takes.
        most, most_of_tenant: tasks that are kept; beyond them the one that is idle for longest ends.
    """

    def __init__(
        self,
        zero_load_s: Callable[[int], float],
        most: int = MAX_TASKS,
        most_of_tenant: int = MAX_TASKS_OF_TENANT,
    ) -> None:
        self._zero_load_s = zero_load_s
        self.history = TaskHistory()
        self._most, self._most_of_tenant = most, most_of_tenant
        self._by_tenant: dict[str, OrderedDict[str, _Task]] = {}
        self._count = self._serial = 0
        self._swept_s = -math.inf

    def __len__(self) -> int:
        return self._count

    def due(self, key: TaskKey, asked: CallAsked) -> CallDue:
        """When a call would be due; nothing is noted."""
        task = self._task(key)
        now_s = asked.arrival_s
        promise = asked.task if task is None else task.promise
        class_index = asked.class_index if task is None else task.class_index
        number = 1 if task is None else task.begun + 1
        left_s = promise.task_s - (0.0 if task is None else task.spent_s(now_s))
        allowed_s = left_s if asked.last else self._allowed_s(promise, class_index, number, left_s)
        context_tokens = 0 if task is None else task.context_tokens
        alone_s = self._alone_s(asked, self.history.tokens(class_index, number), context_tokens)
        needed_s = NEEDED_OF_ALONE * alone_s
        due_s = now_s + min(max(allowed_s, needed_s), left_s)
        late = needed_s / max(allowed_s, 1e-9)
        weight = min(max(late, 1.0), MOST_LATE_WEIGHT)
        return CallDue(key, number, due_s, now_s + left_s, weight, self._serial + 1 if task is None else task.serial)

    def _alone_s(self, asked: CallAsked, tokens: float, context_tokens: int) -> float:
        """Seconds that a call takes alone. What was context of the call before is taken to be cached."""
        new_tokens = asked.prompt_tokens - context_tokens if context_tokens < asked.prompt_tokens else 0
        answer_s = min(asked.hint_tokens or tokens, asked.max_tokens) * self._zero_load_s(1)
        return self._zero_load_s(new_tokens or asked.prompt_tokens) + answer_s

    def _allowed_s(self, promise: TaskPromise, class_index: int, number: int, left_s: float) -> float:
        if promise.calls is not None and number <= promise.calls:
            share = 1.0 / (promise.calls - number + 1)
        else:
            share = self.history.share(class_index, number)
        pauses_s = 0.0
        if promise.pauses_count and number != promise.calls:
            pauses_s = self.history.pauses_left_s(class_index, number)
        return share * max(left_s - pauses_s, LEAST_FOR_CALLS * left_s)

    def begin(self, key: TaskKey, asked: CallAsked) -> tuple[CallDue, list[TaskEnded]]:
        """A call came: when it is due, and tasks that its coming ended."""
        ended = self.sweep(asked.arrival_s)
        due = self.due(key, asked)
        task = self._task(key)
        if task is None:
            ended += self._make_room(key.tenant)
            self._serial += 1
            task = _Task(self._serial, asked.task, asked.class_index, asked.arrival_s, asked.arrival_s)
            self._by_tenant.setdefault(key.tenant, OrderedDict())[key.session] = task
            self._count += 1
        task.begun += 1
        if len(task.tokens) < MAX_TASK_CALLS:
            task.tokens.append(0)
            task.pauses_s.append(0.0 if task.in_flight else max(asked.arrival_s - task.last_s, 0.0))
        if not task.in_flight:
            task.busy_since_s = asked.arrival_s
        task.in_flight += 1
        task.context_tokens = asked.prompt_tokens
        self._by_tenant[key.tenant].move_to_end(key.session)
        return due, ended

    def call_ended(
        self, due: CallDue, now_s: float, output_tokens: int, *, finished: bool, promised: bool, last: bool
    ) -> TaskEnded | None:
        """A call left.

        Args:
            due: what :meth:`begin` said of it.
            now_s: when its last token came.
            output_tokens: of its answer.
            finished: the answer is whole; False where its client left or the engine failed.
            promised: it was promised its due time.
            last: its client says that no other call follows.

        Returns:
            The task, if that has ended.
        """
        task = self._task(due.key)
        if task is None or task.serial != due.serial:
            return None  # forgotten meanwhile
        task.in_flight -= 1
        if task.in_flight == 0:
            task.inside_s += max(now_s - task.busy_since_s, 0.0)
        task.last_s = max(now_s, task.last_s)
        if due.number <= len(task.tokens):
            task.tokens[due.number - 1] += output_tokens
        task.context_tokens += output_tokens
        task.promised &= promised
        task.aborted = not finished
        task.is_last |= last
        self._by_tenant[due.key.tenant].move_to_end(due.key.session)
        return self._end(due.key, task) if task.is_last and task.in_flight == 0 else None

    def withdraw(self, due: CallDue) -> None:
        """A call that began was refused: as if it had never come, or an empty one where another came meanwhile."""
        task = self._task(due.key)
        if task is None or task.serial != due.serial:
            return
        task.in_flight -= 1
        if due.number != task.begun:
            return
        task.begun -= 1
        del task.tokens[task.begun :], task.pauses_s[task.begun :]
        if task.begun == 0:
            self._forget(due.key)

    def sweep(self, now_s: float) -> list[TaskEnded]:
        """End the tasks that are idle for ``IDLE_S``; looks every ``SWEEP_EVERY_S``."""
        if now_s - self._swept_s < SWEEP_EVERY_S:
            return []
        self._swept_s = now_s
        idle = [(tenant, tasks, list(self._idle(tasks, now_s))) for tenant, tasks in self._by_tenant.items()]
        return [
            self._end(TaskKey(tenant, session), tasks[session])
            for tenant, tasks, several in idle
            for session in several
        ]

    @staticmethod
    def _idle(tasks: OrderedDict[str, _Task], now_s: float) -> Iterator[str]:
        """Sessions without a call for long, those unused for longest first; one that is in use ends the search."""
        for session, task in tasks.items():
            if task.in_flight or now_s - task.last_s < IDLE_S:
                return
            yield session

    def _task(self, key: TaskKey) -> _Task | None:
        tasks = self._by_tenant.get(key.tenant)
        return None if tasks is None else tasks.get(key.session)

    def _make_room(self, tenant: str) -> list[TaskEnded]:
        """End the task that was used least lately, of the tenant or, in a full book, of whoever has most."""
        tasks = self._by_tenant.get(tenant) or OrderedDict()
        if len(tasks) < self._most_of_tenant:
            if self._count < self._most:
                return []
            tenant, tasks = max(self._by_tenant.items(), key=lambda pair: len(pair[1]))
        session = next(iter(tasks))
        return [self._end(TaskKey(tenant, session), tasks[session])]

    def _end(self, key: TaskKey, task: _Task) -> TaskEnded:
        self._forget(key)
        spent_s = task.last_s - task.started_s if task.promise.pauses_count else task.inside_s
        in_time = spent_s <= task.promise.task_s
        gone = task.aborted or task.in_flight > 0
        if not gone:
            self.history.learn(task.class_index, task.tokens, task.pauses_s)
        kept = None if gone and in_time else in_time
        return TaskEnded(key, task.class_index, task.begun, spent_s, kept, task.promised)

    def _forget(self, key: TaskKey) -> None:
        del self._by_tenant[key.tenant][key.session]
        self._count -= 1
        if not self._by_tenant[key.tenant]:
            del self._by_tenant[key.tenant]
