"""The one interface every scheduling policy has, whoever drives it: vLLM, the simulator or a router's mirror."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.perf.batch_time import BatchShape

IntArray = NDArray[np.int64]


class Policy(Protocol):
    """Decides each step. Knows no clock, does no I/O and never logs; told of what happened, asked what to do.

    One that learns nothing from steps may say in ``decodes_all`` (int) how many running requests it always decodes
    together, a token each, when nobody waits: the simulator then carries out such steps without asking for each.
    """

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Plan the step that starts at ``now_s`` (predicted, when the engine runs one ahead).

        May change ``status`` and ``expected_tokens`` of rows in ``view.table``; nothing else.
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
