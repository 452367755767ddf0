"""vLLM V1's order: one token budget a step, running requests first, then waiting ones first come, first served.

Prefills are chunked. The budget is ``max_num_batched_tokens``: 2048 is the server's default on most devices, 8192 that
of large ones. Source: vllm/v1/core/sched/scheduler.py of vLLM 0.32.
"""

from __future__ import annotations

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    batch_plan,
    checked_draft_tokens,
    checked_tokens,
    chunked,
    room_for,
    room_of,
)


class VllmOrder(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        token_budget: most tokens in a step.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(self, token_budget: int = 2048, draft_tokens: int = 0) -> None:
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._token_budget = checked_tokens("token_budget", token_budget)

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Fill the budget in queue order."""
        out = room_for(view)
        room = room_of(view, self._token_budget)
        count = chunked(view.table.rows, view.running, view.waiting, room, self._draft_tokens, out)
        return batch_plan(out, count)
