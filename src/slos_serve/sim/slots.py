"""What an engine knows of each row of its request table beyond what the policy sees, as arrays for kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class Slots(NamedTuple):
    """Arrays with one entry a table row, [slots]; those of the step that executes have one entry a request in it.

    Attributes:
        call_of: row of the workload; -1 where there is no request.
        held: KV blocks of the request.
        referred: of them, those that belong to the prefix cache.
        nodes: nodes of its path that it holds by reference.
        brought: prompt tokens whose KV comes from another replica.
        hit: prompt tokens that the prefix cache supplied when it first started.
        lost: tokens that it had computed when it was preempted; 0 once it runs again.
        seen: 0 between two checks of a plan.
        step_slots, step_tokens, step_drafts: the step that executes.
        step_accepted: drafts that were right; -1 where none were verified.
        scratch: slots that a rule of the engine returns.
    """

    call_of: IntArray
    held: IntArray
    referred: IntArray
    nodes: IntArray
    brought: IntArray
    hit: IntArray
    lost: IntArray
    seen: IntArray
    step_slots: IntArray
    step_tokens: IntArray
    step_drafts: IntArray
    step_accepted: IntArray
    scratch: IntArray


def grown(slots: Slots | None, size: int) -> Slots:
    """Slots with one entry a table row, those that are there kept: a step may be executing."""
    old = len(slots.call_of) if slots is not None else 0
    if slots is not None and old == size:
        return slots
    arrays = np.zeros((len(Slots._fields), size), dtype=np.int64)
    arrays[0] = -1
    if slots is not None:
        arrays[:, :old] = slots
    return Slots(*arrays)
