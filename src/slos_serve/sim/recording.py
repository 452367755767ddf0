"""What a simulation leaves behind, compactly: every token's time, every call's fate, every step's shape."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from slos_serve.sim.step import COMPLETED, REJECTED
from slos_serve.workload.calls import Workload
from slos_serve.workload.prefixes import Prefixes

CALL_RECORD_DTYPE = np.dtype(
    [
        ("arrival_s", np.float64),  # nan when it never arrived
        ("done_s", np.float64),  # nan unless it completed
        ("replica", np.int32),  # the last one it was sent to, -1 when none
        ("outcome", np.int32),  # PENDING, COMPLETED, REJECTED, LOST of sim.step
        ("admitted", np.int32),  # 1 when a promise was made to it
        ("demoted", np.int32),  # 1 when a promise made was taken back
        ("rank", np.int32),  # which of its class's promises it asks for or was made: 0 the first, then the weaker ones
        ("preemptions", np.int32),
        ("cached_tokens", np.int32),  # prompt tokens that a prefix cache supplied
        ("output_tokens", np.int64),  # tokens that came
    ]
)

STEP_DTYPE = np.dtype(
    [
        ("start_s", np.float64),
        ("duration_s", np.float32),
        ("predicted_s", np.float32),
        ("replica", np.int16),
        ("num_seqs", np.int16),
        ("new_tokens", np.int32),
        ("running", np.int16),
        ("waiting", np.int32),
        ("used_blocks", np.int32),
    ]
)


class StepLog:
    """Steps in order of their start, grown by doubling."""

    def __init__(self) -> None:
        self._rows: NDArray[np.void] = np.zeros(1024, dtype=STEP_DTYPE)
        self._count = 0

    def add(self, row: tuple[float, float, float, int, int, int, int, int, int]) -> None:
        """Append one step; fields in the order of :data:`STEP_DTYPE`."""
        if self._count == len(self._rows):
            self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)))
        self._rows[self._count] = row
        self._count += 1

    @property
    def rows(self) -> NDArray[np.void]:
        """:data:`STEP_DTYPE`, one row a step."""
        return self._rows[: self._count]


@dataclass
class Recording:
    """Result of a simulation.

    Attributes:
        workload: what was served, promises in seconds.
        calls: :data:`CALL_RECORD_DTYPE`, one row a call.
        token_s: float32, token times after their call's arrival, all calls one after the other.
        token_start: int64 [calls], where each call's tokens begin in ``token_s``.
        steps: every step of every replica.
        end_s: virtual time at the end.
        num_steps, num_preemptions, num_empty_plans, num_no_room: counts over all replicas.
        num_recomputed: tokens computed again after a preemption.
        weaker: call -> seconds of the weaker promise that it asks for or was made: first token, per output token, last
            token.
        num_drafted, num_accepted: draft tokens verified, and those that were right; verifications that ended an answer
            are left out.
        stopped_early: the run was cut short because its attainment could no longer reach what was asked.
    """

    workload: Workload
    calls: NDArray[np.void]
    token_s: NDArray[np.float32]
    token_start: NDArray[np.int64]
    steps: StepLog = field(default_factory=StepLog)
    end_s: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    num_empty_plans: int = 0
    num_no_room: int = 0
    num_recomputed: int = 0
    weaker: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    num_drafted: int = 0
    num_accepted: int = 0
    stopped_early: bool = False

    @cached_property
    def prefixes(self) -> Prefixes:
        """Which prompts begin alike."""
        return self.workload.prefixes

    @cached_property
    def longest_path(self) -> int:
        """Most nodes that a prompt begins with."""
        return int(np.diff(self.prefixes.path_start).max(initial=0))

    @classmethod
    def of(cls, workload: Workload) -> Recording:
        """An empty recording with room for every token of a workload."""
        output_tokens = workload.calls["output_tokens"]
        calls = np.zeros(len(output_tokens), dtype=CALL_RECORD_DTYPE)
        calls["arrival_s"] = np.nan
        calls["done_s"] = np.nan
        calls["replica"] = -1
        ends = np.cumsum(output_tokens)
        token_start = np.concatenate((np.zeros(1, dtype=np.int64), ends[:-1])) if len(ends) else ends
        total = int(ends[-1]) if len(ends) else 0
        return cls(workload, calls, np.full(total, np.nan, dtype=np.float32), token_start.astype(np.int64))

    def digest(self) -> str:
        """SHA-256 over every byte of the outcome: equal for equal seeds."""
        digest = hashlib.sha256()
        for part in (self.calls, self.token_s, self.steps.rows):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    @property
    def completed(self) -> NDArray[np.bool_]:
        """bool [calls]."""
        return np.asarray(self.calls["outcome"] == COMPLETED)

    @property
    def rejected(self) -> NDArray[np.bool_]:
        """bool [calls]."""
        return np.asarray(self.calls["outcome"] == REJECTED)
