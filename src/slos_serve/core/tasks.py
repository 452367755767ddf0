"""What is promised to a whole task: several calls of one session, of which the last answer is due.

A class with ``task_ms`` is a :class:`TaskClass`; a request may bring the number by itself. When each call is due is
:mod:`slos_serve.perf.tasks`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import MAX_LATENCY_MS, SLO, SLOClass, check_number, single_stage

MAX_TASK_CALLS = 1000


@dataclass(frozen=True, slots=True)
class TaskPromise:
    """When a task is to be done.

    Attributes:
        task_ms: from the arrival of its first call to the last token of its last one.
        calls: how many calls it will have, where somebody knows; ``None`` leaves that to what was learnt.
        pauses_count: time between calls, in tools, counts; else only time with a call in the server does.
    """

    task_ms: float
    calls: int | None = None
    pauses_count: bool = True

    def __post_init__(self) -> None:
        check_number("task_ms", self.task_ms, low=0.0, high=MAX_LATENCY_MS)
        check_calls("task_calls", self.calls)

    @property
    def task_s(self) -> float:
        """``task_ms`` in seconds."""
        return self.task_ms / 1000.0


@dataclass(frozen=True, slots=True)
class TaskClass(SLOClass):
    """A class whose requests are calls of tasks.

    Attributes:
        task: what the whole task is promised; the other promises are each call's own.
    """

    task: TaskPromise = field(kw_only=True)

    def __post_init__(self) -> None:
        SLOClass.__post_init__(self)
        if self.otherwise:
            raise InvalidFieldError(f"classes.{self.name}.otherwise", "task_ms", "no weaker promises beside task_ms")

    @property
    def best_effort(self) -> bool:
        """Never: the task is promised."""
        return False


def task_of(slo_class: SLOClass | None) -> TaskPromise | None:
    """What the task of a class's requests is promised; ``None`` without one."""
    return slo_class.task if isinstance(slo_class, TaskClass) else None


def with_task(slo_class: SLOClass, task: TaskPromise) -> TaskClass:
    """The same class for a call of a task."""
    own = {each.name: getattr(slo_class, each.name) for each in fields(SLOClass)}
    return TaskClass(**{**own, "otherwise": ()}, task=task)


def task_applied(
    applied: SLOClass | None, named: SLOClass | None, task_ms: float | None, calls: int | None
) -> SLOClass | None:
    """The class of a call, its own numbers for its task applied.

    Args:
        applied: the class that it gets, which is another one for the last call of a session.
        named: the class that it names, whose task it is a call of.
        task_ms, calls: the request's own, over those of the class.

    Raises:
        InvalidFieldError: a number of calls, and no task.
    """
    given = task_of(named)
    if task_ms is None and given is None:
        if calls is not None:
            raise InvalidFieldError("slo_task_calls", calls, "only beside slo_task_ms, or a class with task_ms")
        return applied
    task_ms = given.task_ms if task_ms is None and given is not None else task_ms
    assert task_ms is not None
    known = given.calls if calls is None and given is not None else calls
    task = TaskPromise(task_ms, known, given is None or given.pauses_count)
    return with_task(single_stage("custom", SLO()) if applied is None else applied, task)


def check_calls(name: str, value: object, where: str | None = None) -> int | None:
    """Return ``value`` when it can be a task's number of calls, else raise :class:`InvalidFieldError`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TASK_CALLS:
        raise InvalidFieldError(name, value, f"a whole number in [1, {MAX_TASK_CALLS}]", where)
    return value
