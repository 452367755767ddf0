"""By row, what the plug-in knows of a request's progress, so that a step needs no Python call for each request.

Without drafts, KV loads, streaming input and pipeline stages vLLM's asynchronous scheduler advances a running request
in one way only: its computed tokens grow by what was scheduled, and a request whose prompt is done gets one more output
token in flight. So a planned step tells all that follows from it. In every other case, and in every
``AUDIT_EVERY``-th step, all counters are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.errors import PlanMismatchError
from slos_serve.core.request import RequestTable, SlotArray
from slos_serve.vllm_plugin import compat_counters, row_kernels
from slos_serve.vllm_plugin.compat_counters import IntArray
from slos_serve.vllm_plugin.tracked import Tracked

if TYPE_CHECKING:
    from vllm.v1.request import Request


AUDIT_EVERY = 32
_COLUMNS = (
    "requests",
    "taken",
    "ends",
    "stage_offsets",
    "seen",
    "last_token_s",
    "promised",
    "steady",
    "listed",
    "fixed_blocks",
    "decode_blocks",
)


class Progress:
    """Columns beside the planner's table that only the plug-in needs.

    Attributes:
        requests: object, vLLM's request in each row; ``None`` in a free one.
        taken: whether there is one.
        ends: int64, tokens that the request has when it ends at the latest.
        stage_offsets: int64, output tokens that came before its stage.
        seen: int64, output tokens accounted for.
        last_token_s: when the newest of them came.
        promised: whether it carries a promise.
        steady: whether its last stage has begun: a new token changes nothing but its count and time.
        fixed_blocks, decode_blocks: int64, see :class:`slos_serve.vllm_plugin.tracked.Tracked`.
        listed: whether it was in vLLM's running list, or a session with a worker's slot, when that was last looked at.
    """

    def __init__(self, num_rows: int) -> None:
        self.requests: NDArray[np.object_] = np.full(num_rows, None, dtype=object)
        self.taken: NDArray[np.bool_] = np.zeros(num_rows, dtype=bool)
        self.ends: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.stage_offsets: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.seen: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.last_token_s: NDArray[np.float64] = np.zeros(num_rows)
        self.promised: NDArray[np.bool_] = np.zeros(num_rows, dtype=bool)
        self.steady: NDArray[np.bool_] = np.zeros(num_rows, dtype=bool)
        self.listed: NDArray[np.bool_] = np.zeros(num_rows, dtype=bool)
        self.fixed_blocks: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.decode_blocks: IntArray = np.zeros(num_rows, dtype=np.int64)

    def enter(self, tracked: Tracked, num_rows: int) -> None:
        """A request takes its row of ``num_rows``, or begins a turn in it."""
        missing = num_rows - len(self.requests)
        if missing > 0:
            for name in _COLUMNS:
                column = getattr(self, name)
                empty = np.full(missing, None if column.dtype == object else 0, dtype=column.dtype)
                setattr(self, name, np.concatenate((column, empty)))
        slot = tracked.slot
        self.requests[slot], self.taken[slot] = tracked.request, True
        self.promised[slot] = tracked.promise.slo_class is not None
        self.fixed_blocks[slot], self.decode_blocks[slot] = tracked.fixed_blocks, tracked.decode_blocks
        self.ends[slot] = compat_counters.ends_of((tracked.request,))[0]
        self.note(tracked)

    def note(self, tracked: Tracked) -> None:
        """Take over what became of a request's stages and tokens."""
        slot = tracked.slot
        self.stage_offsets[slot], self.seen[slot] = tracked.stage_offset, tracked.seen_tokens
        self.last_token_s[slot] = tracked.last_token_s or 0.0
        self.steady[slot] = tracked.stage_start_s is not None and not tracked.more_stages

    def settle(self, tracked: Tracked) -> None:
        """Write what was counted here into the request's own record."""
        if self.steady[tracked.slot]:
            tracked.seen_tokens = int(self.seen[tracked.slot])
            tracked.last_token_s = float(self.last_token_s[tracked.slot])

    def leave(self, slot: int) -> None:
        """The row is free."""
        self.requests[slot] = None
        self.taken[slot] = self.steady[slot] = self.promised[slot] = self.listed[slot] = False

    def requests_of(self, slots: SlotArray) -> list[Request]:
        """vLLM's requests in these rows.

        Raises:
            PlanMismatchError: a slot holds no request.
        """
        if not len(slots):
            return []
        if slots.min() < 0 or slots.max() >= len(self.requests):
            raise PlanMismatchError("the plan names a slot that is not there")
        if not self.taken[slots].all():
            raise PlanMismatchError("the plan names a slot that holds no request")
        found: list[Request] = self.requests[slots].tolist()
        return found

    def came(self, slots: SlotArray, now_s: float) -> tuple[SlotArray, SlotArray, IntArray]:
        """Count new tokens of promised requests.

        Returns:
            Rows with new tokens; those of them whose stage begins or may end, and the output tokens of the latter.
        """
        slots = slots[self.promised[slots]]
        totals = compat_counters.output_tokens(self.requests[slots].tolist())
        new = totals != self.seen[slots]
        slots, totals = slots[new], totals[new]
        steady = self.steady[slots]
        self.seen[slots[steady]] = totals[steady]
        self.last_token_s[slots[steady]] = now_s
        return slots, slots[~steady], totals[~steady]

    def advance(
        self, table: RequestTable, slots: SlotArray, requests: Sequence[Request], pending_first_s: float
    ) -> None:
        """Bring rows of running requests up to date from their computed tokens alone, which are there already."""
        rows = table.rows
        near = row_kernels.advance_rows(rows, slots, self.stage_offsets, self.ends, pending_first_s)
        if len(near):
            ending, rows_near = [requests[position] for position in near.tolist()], slots[near]
            computed = rows["computed_tokens"][rows_near]
            rows["blocked"][rows_near] = compat_counters.last_in_flight(ending, computed, self.ends[rows_near])

    def charge_blocks(self, table: RequestTable, slots: SlotArray) -> None:
        """Charge running requests what they keep of their fixed blocks: less once their prompts are computed."""
        rows = table.rows
        outputs = rows["output_tokens"][slots]
        decodes = (outputs >= 2) & (rows["computed_tokens"][slots] + 1 >= rows["prompt_tokens"][slots] + outputs)
        rows["fixed_blocks"][slots] = np.where(decodes, self.decode_blocks[slots], self.fixed_blocks[slots])
