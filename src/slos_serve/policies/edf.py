"""Earliest deadline first: all decodes, then prefill chunks in order of deadline, in a fixed token budget.

The textbook answer to deadlines, and what a priority queue in front of a chunked engine amounts to. It admits everyone,
so under overload it works on requests that are late already (the domino effect); ``drop_late`` puts those last. A
prompt starts only when its KV blocks, those that prompts under way still need, and the watermark are free: prompts that
start side by side would preempt each other.
"""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    batch_plan,
    checked_draft_tokens,
    checked_tokens,
    checked_watermark,
    decodes_then,
    room_for,
    room_of,
)


class EarliestDeadlineFirst(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        token_budget: most tokens in a step; 256 to 2,048 are worth trying.
        drop_late: requests whose first token is late already come after all others.
        watermark: share of the KV blocks that stays free when a prompt starts.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(
        self, token_budget: int = 2048, drop_late: bool = False, watermark: float = 0.01, draft_tokens: int = 0
    ) -> None:
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._token_budget = checked_tokens("token_budget", token_budget)
        self._watermark = checked_watermark(watermark)
        self._drop_late = drop_late

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Fill the budget in order of deadline."""
        rows, out = view.table.rows, room_for(view)
        everyone = np.concatenate((view.running, view.waiting))
        due_s = np.minimum(rows["ttft_due_s"][everyone], rows["answer_due_s"][everyone])
        late = (due_s < now_s) & (rows["output_tokens"][everyone] == 0) & self._drop_late
        ordered = everyone[np.lexsort((rows["order"][everyone], due_s, late))]
        room = room_of(view, self._token_budget, self._watermark)
        count = decodes_then(rows, view.running, ordered, room, self._draft_tokens, out)
        return batch_plan(out, count, Reason.PREFILL_DEADLINE)
