"""The planner's picture of every request in an engine: one row a request, in one array.

Rows live in slots that are reused. Adapters (the vLLM plug-in, the simulator, a router's mirror) write rows when an
event happens; kernels read whole columns. ``now_s`` and all ``*_s`` columns of one table share one clock.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MAX_DRAFT_TOKENS = 10
NUM_SHARES = 256


def share_of(class_index: int, num_classes: int = NUM_SHARES, tenant: int = 0) -> int:
    """Whose part of what an engine gives a request takes: its class's, or its tenant's within that class.

    Args:
        num_classes: classes there are. Beyond ``NUM_SHARES`` some share a part.
        tenant: 1 and up for tenants that are known by name; 0 for everybody else, together. Where tenants are too many
            for the table, some share a part.
    """
    tenants = max(NUM_SHARES // num_classes, 1)
    return (class_index + num_classes * (tenant % tenants)) % NUM_SHARES


class Status(IntEnum):
    """Where a request stands with its promise."""

    UNDECIDED = 0
    """Waits; may still be admitted."""
    ADMITTED = 1
    """Its promise is being kept."""
    BEST_EFFORT = 2
    """Runs in what is left over: no SLO, or one that could not be kept."""


# What every plan reads of every waiting request comes first: it lies in two cache lines of the row's four.
REQUEST_DTYPE = np.dtype(
    [
        ("order", np.int64),  # arrival order, grows
        ("share", np.int64),  # see :func:`share_of`
        ("status", np.int64),
        ("class_index", np.int64),
        ("answer_due_s", np.float64),  # when the last token is due; inf without such a promise
        ("output_tokens", np.int64),  # tokens generated, those of steps in flight counted
        ("hint_tokens", np.int64),  # the client's own forecast of it; 0 without one
        ("max_tokens", np.int64),  # hard cap on output_tokens
        ("expected_tokens", np.int64),  # forecast of the final output_tokens
        ("prompt_tokens", np.int64),
        ("computed_tokens", np.int64),  # tokens with KV, those of steps in flight counted
        ("cached_tokens", np.int64),  # prompt tokens that a prefix cache will supply when it starts
        ("running", np.int64),  # 1 when the engine holds KV for it (its "running" list)
        ("blocked", np.int64),  # 1 when the engine could not run it in this step (pipeline cadence): it keeps its KV
        ("arrival_s", np.float64),
        ("ttft_due_s", np.float64),  # when the plan has the first token due: as promised, or earlier for answer_due_s
        ("tpot_s", np.float64),  # of the current stage, as planned: as promised, or shorter for answer_due_s
        ("promised_ttft_due_s", np.float64),  # when the first token is due; inf without a TTFT promise
        ("promised_tpot_s", np.float64),  # of the current stage; inf without a TPOT promise
        ("stage_start_s", np.float64),  # when its first token came (predicted while in flight); nan before
        ("last_token_s", np.float64),  # when the newest token came or will come; arrival_s before the first
        ("max_stall_s", np.float64),
        ("weight", np.float64),
        ("stage_tokens", np.int64),  # output_tokens of the current stage; a token that ends a stage belongs to it
        ("draft_limit", np.int64),  # drafts that the engine could verify now; what a drafter has found
        ("has_slo", np.int64),  # 1 when anything is promised
        ("missed", np.int64),  # 1 when a promise of it, or of an earlier call of its session, is broken for good
        ("adapter", np.int64),  # LoRA adapter it needs; 0 without one
        ("fixed_blocks", np.int64),  # KV blocks it takes when it starts, beside those that grow with its tokens
        ("step_pace_s", np.float64),  # with answer_due_s: the pace that steps are cut short for, tpot_s or longer
    ]
)

RequestArray = NDArray[np.void]
SlotArray = NDArray[np.int64]


class RequestTable:
    """Slots of :data:`REQUEST_DTYPE`, grown by doubling.

    ``rows`` is replaced when the table grows, so read it anew after :meth:`add`.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.rows: RequestArray = np.zeros(max(capacity, 1), dtype=REQUEST_DTYPE)
        self._free: list[int] = list(range(len(self.rows) - 1, -1, -1))
        self._num_added = 0

    def __len__(self) -> int:
        return len(self.rows) - len(self._free)

    def add(
        self,
        *,
        arrival_s: float,
        prompt_tokens: int,
        max_tokens: int,
        ttft_due_s: float = np.inf,
        tpot_s: float = np.inf,
        answer_due_s: float = np.inf,
        class_index: int = 0,
        share: int | None = None,
        weight: float = 1.0,
        max_stall_s: float = np.inf,
        hint_tokens: int = 0,
        cached_tokens: int = 0,
        missed: bool = False,
        adapter: int = 0,
        fixed_blocks: int = 0,
    ) -> int:
        """Enter a waiting request; returns its slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        row = self.rows[slot]
        has_slo = bool(np.isfinite(min(ttft_due_s, tpot_s, answer_due_s)))
        row["arrival_s"] = arrival_s
        row["ttft_due_s"] = row["promised_ttft_due_s"] = ttft_due_s
        row["tpot_s"] = row["promised_tpot_s"] = row["step_pace_s"] = tpot_s
        row["answer_due_s"] = answer_due_s
        row["stage_start_s"] = np.nan
        row["last_token_s"] = arrival_s
        row["max_stall_s"] = max_stall_s
        row["weight"] = weight
        row["prompt_tokens"] = prompt_tokens
        row["computed_tokens"] = 0
        row["output_tokens"] = 0
        row["stage_tokens"] = 0
        row["max_tokens"] = max_tokens
        row["expected_tokens"] = min(hint_tokens, max_tokens) or max_tokens
        row["hint_tokens"] = hint_tokens
        row["draft_limit"] = MAX_DRAFT_TOKENS
        row["cached_tokens"] = cached_tokens
        row["class_index"] = class_index
        row["share"] = share_of(class_index) if share is None else share
        row["order"] = self._num_added
        row["status"] = Status.UNDECIDED if has_slo else Status.BEST_EFFORT
        row["has_slo"] = has_slo
        row["missed"] = missed
        row["running"] = 0
        row["blocked"] = 0
        row["adapter"] = adapter
        row["fixed_blocks"] = fixed_blocks
        self._num_added += 1
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot; its row may be reused by the next :meth:`add`."""
        self._free.append(slot)

    def _grow(self) -> None:
        old = len(self.rows)
        rows = np.zeros(2 * old, dtype=REQUEST_DTYPE)
        rows[:old] = self.rows
        self.rows = rows
        self._free = list(range(2 * old - 1, old - 1, -1))
