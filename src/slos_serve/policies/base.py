"""The one interface every scheduling policy has, whoever drives it: vLLM, the simulator or a router's mirror."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import SlotArray
from slos_serve.perf.batch_time import BatchShape

IntArray = NDArray[np.int64]


class Policy(Protocol):
    """Decides each step. Knows no clock, does no I/O and never logs; told of what happened, asked what to do."""

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Plan the step that starts at ``now_s`` (predicted, when the engine runs one ahead).

        May change ``expected_tokens`` of rows in ``view.table``; nothing else. A plan that is never committed leaves no
        other trace.
        """
        ...

    def commit(self, plan: StepPlan, view: EngineView, ran: SlotArray) -> None:
        """The plan was carried out: write the promises it makes into the table.

        Args:
            plan: from :meth:`plan`.
            view: what it was planned from.
            ran: int64, slots that really ran.
        """
        ...

    def on_step_done(self, shape: BatchShape, duration_s: float) -> None:
        """Learn from an executed batch how long it really took."""
        ...

    def on_verified(self, class_index: IntArray, drafted: IntArray, accepted: IntArray) -> None:
        """Learn how many of the draft tokens of a step were right: int64 [n] each, one entry a verification.

        Verifications in which an answer ended are left out.
        """
        ...

    def on_request_done(self, class_index: int, prompt_tokens: int, output_tokens: int) -> None:
        """Learn the length of a request that ended by itself (not aborted)."""
        ...


class StockPolicy:
    """A policy that promises nothing and learns nothing: :meth:`Policy.plan` is all it has of its own."""

    def commit(self, plan: StepPlan, view: EngineView, ran: SlotArray) -> None:
        """Promises nothing."""

    def on_step_done(self, shape: BatchShape, duration_s: float) -> None:
        """Learns nothing."""

    def on_verified(self, class_index: IntArray, drafted: IntArray, accepted: IntArray) -> None:
        """Learns nothing."""

    def on_request_done(self, class_index: int, prompt_tokens: int, output_tokens: int) -> None:
        """Learns nothing."""
