"""vLLM V0's order: whole prompts first, and a decode step of all running requests only when no prompt can start.

This is what "vLLM" means in papers of 2023 and 2024: no chunks, prefill takes precedence, 1 % of the KV blocks stay
free when a prompt starts (the watermark). Source: ``_schedule_default`` of vllm/core/scheduler.py up to vLLM 0.8.
"""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.slo import check_number
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    checked_draft_tokens,
    draft_all,
    rest_of_prompt,
    step_plan,
    whole_prompts,
)

WATERMARK = 0.01
_ANY_NUMBER = 1 << 62


class VllmV0(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        token_budget: most prompt tokens in a prefill step; a longer prompt runs alone.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(self, token_budget: int = 8192, draft_tokens: int = 0) -> None:
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._token_budget = int(check_number("token_budget", token_budget, low=1, high=1e6, low_included=True))

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """A prefill step when a prompt can start, else a decode step."""
        rest = rest_of_prompt(view)
        if rest is not None:
            return rest
        size = len(view.waiting)
        slots, tokens = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        count = whole_prompts(
            view.table.rows,
            view.waiting,
            len(view.running),
            min(self._token_budget, view.max_num_batched_tokens),
            view.max_num_seqs,
            view.free_blocks,
            view.block_size,
            int(WATERMARK * view.total_blocks) if len(view.running) else 0,
            slots,
            tokens,
            view.max_num_batched_tokens,
        )
        if count:
            return step_plan(slots[:count], tokens[:count])
        drafts = draft_all(
            view.table.rows,
            view.running,
            self._draft_tokens,
            view.max_num_batched_tokens,
            view.free_blocks,
            view.block_size,
        )
        return step_plan(view.running.copy(), 1 + drafts, drafts=drafts)
