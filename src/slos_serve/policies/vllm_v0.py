"""vLLM V0's order: whole prompts first, and a decode step of all running requests only when no prompt can start.

This is what "vLLM" means in papers of 2023 and 2024: no chunks, prefill takes precedence, 1 % of the KV blocks stay
free when a prompt starts (the watermark). Source: ``_schedule_default`` of vllm/core/scheduler.py up to vLLM 0.8.
"""

from __future__ import annotations

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    batch_plan,
    checked_draft_tokens,
    checked_tokens,
    draft_all,
    rest_of_prompt,
    room_for,
    room_of,
    whole_prompts,
)

WATERMARK = 0.01


class VllmV0(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        token_budget: most prompt tokens in a prefill step; a longer prompt runs alone.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(self, token_budget: int = 8192, draft_tokens: int = 0) -> None:
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._token_budget = checked_tokens("token_budget", token_budget)

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """A prefill step when a prompt can start, else a decode step."""
        rest = rest_of_prompt(view)
        if rest is not None:
            return rest
        rows, out = view.table.rows, room_for(view)
        room = room_of(view, self._token_budget, WATERMARK)
        count = whole_prompts(rows, view.waiting, len(view.running), room, view.max_num_batched_tokens, out)
        if count:
            return batch_plan(out, count)
        count = len(view.running)
        drafts = draft_all(rows, view.running, self._draft_tokens, room_of(view, view.max_num_batched_tokens))
        out[:, :count] = view.running, 1 + drafts, drafts
        return batch_plan(out, count)
