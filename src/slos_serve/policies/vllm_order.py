"""vLLM V1's order: one token budget a step, running requests first, then waiting ones first come, first served.

Prefills are chunked. The budget is ``max_num_batched_tokens``: 2048 is the server's default on most devices, 8192 that
of large ones. Source: vllm/v1/core/sched/scheduler.py of vLLM 0.32.
"""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.slo import check_number
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import checked_draft_tokens, chunked, step_plan


class VllmOrder(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        token_budget: most tokens in a step.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(self, token_budget: int = 2048, draft_tokens: int = 0) -> None:
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._token_budget = int(check_number("token_budget", token_budget, low=1, high=1e6, low_included=True))

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Fill the budget in queue order."""
        size = len(view.running) + len(view.waiting)
        slots, tokens, drafts = np.empty((3, size), dtype=np.int64)
        budget = min(self._token_budget, view.max_num_batched_tokens)
        count = chunked(
            view.table.rows,
            view.running,
            view.waiting,
            budget,
            view.max_num_seqs,
            view.free_blocks,
            view.block_size,
            0,
            slots,
            tokens,
            self._draft_tokens,
            drafts,
        )
        return step_plan(slots[:count], tokens[:count], drafts=drafts[:count])
