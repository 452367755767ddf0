"""What a fleet's ingress hands to the replica that serves a request: a call's due time, and that a promise was told.

A task has one book, at the ingress, not one a replica. Both travel in the request's extra arguments under keys that are
always written or removed, so that a client's own value never arrives. Only a replica of a fleet reads them. Times count
from the arrival: clocks of nodes differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slos_serve.perf.tasks import MOST_LATE_WEIGHT, CallDue, TaskKey
from slos_serve.vllm_plugin.slo_args import TOLD_KEY

HANDED_KEY = "slos_serve_task_call"
_NOT_IN_A_BOOK = 0


def with_handed(
    extra_args: Mapping[str, Any] | None, call: CallDue | None, arrival_s: float
) -> Mapping[str, Any] | None:
    """The extra arguments with what the replica is to know of the call, or without that key."""
    if call is not None:
        numbers = (call.due_s - arrival_s, call.task_due_s - arrival_s, call.weight)
        return {**(extra_args or {}), HANDED_KEY: " ".join(f"{number:.6g}" for number in numbers)}
    if extra_args is None or HANDED_KEY not in extra_args:
        return extra_args
    return {key: value for key, value in extra_args.items() if key != HANDED_KEY}


def with_told(extra_args: Mapping[str, Any] | None, rank: int | None) -> Mapping[str, Any] | None:
    """The extra arguments with the rank of the promise that the client was told, or without any."""
    if rank is not None:
        return {**(extra_args or {}), TOLD_KEY: rank}
    if extra_args is None or TOLD_KEY not in extra_args:
        return extra_args
    return {key: value for key, value in extra_args.items() if key != TOLD_KEY}


def handed_call(extra_args: Mapping[str, Any] | None, key: TaskKey, arrival_s: float) -> CallDue | None:
    """The call that was handed over; ``None`` without one, and for a value that is none."""
    value = (extra_args or {}).get(HANDED_KEY)
    try:
        due_s, task_due_s, weight = (float(part) for part in str(value).split(" "))
    except ValueError:
        return None
    if not all(map(math.isfinite, (due_s, task_due_s, weight))):
        return None
    weight = min(max(weight, 1.0), MOST_LATE_WEIGHT)
    return CallDue(key, 0, arrival_s + due_s, arrival_s + task_due_s, weight, _NOT_IN_A_BOOK)
