"""One dry plan at start: the check that a vLLM has what the plug-in reads, beyond the names themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.controller import StepController
from slos_serve.vllm_plugin.steering import SteeredStep, select
from slos_serve.vllm_plugin.tracked import Promise

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


def dry_plan(scheduler: Scheduler, control: StepController) -> Exception | None:
    """Plan a step with one request in the queue, steer and put everything back; the error, if any.

    No step is made and vLLM's scheduler is as it was.
    """
    probe = compat.probe_request()
    queue, book = scheduler.waiting, control.book
    never = float("inf")
    promise = Promise(None, 0, 0.0, never, never, never, never, hint_tokens=0, max_tokens=1)
    scheduler.waiting = compat.queue_of((probe,))
    try:
        control.hits.waits((book.add(probe, promise),))
        control.queues.changed()
        view = control.look(0.0)
        plan = control.policy.plan(0.0, view)
        chosen = select(scheduler, plan, book, control.limits.needs, ())
        faults: list[Exception] = []
        with SteeredStep(scheduler, chosen, 0.0, control.hidden, lambda _, error: faults.append(error)):
            pass
        if faults:
            return faults[0]
    except Exception as error:
        return error
    finally:
        scheduler.waiting = queue
        tracked = book.remove(probe.request_id)
        if tracked is not None:
            control.forget(tracked)
        control.queues.changed()
    return None
