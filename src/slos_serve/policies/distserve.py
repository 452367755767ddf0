"""DistServe: prefill and decode on replicas of their own, so that neither disturbs the other.

A prefill replica batches whole prompts first come, first served, up to the length at which its compute saturates; a
decode replica runs all its requests in every step and starts what has arrived while memory lasts. Which replicas do
which is the split, searched over for the workload as the paper's placement does; the KV cache moves in between.
Source: Zhong et al., OSDI 2024 (arXiv 2401.09670), sections 3 and 4.
"""

from __future__ import annotations

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    batch_plan,
    checked_draft_tokens,
    checked_tokens,
    chunked,
    rest_of_prompt,
    room_for,
    room_of,
    whole_prompts,
)

# Prompts are batched until the compute-bound branch exceeds the constant work of a step this many times over.
SATURATION = 2.0
MIN_PREFILL_TOKENS = 512


def saturating_tokens(model: BatchTimeModel) -> int:
    """Prompt tokens in a batch beyond which more of them only add up (the paper's L_m)."""
    slope = max(model.k_c_s, model.k_m_s)
    constant = max(model.b_c_s, model.b_m_s)
    return max(MIN_PREFILL_TOKENS, int(SATURATION * constant / slope))


class DistServePrefill(StockPolicy):
    """Policy of a prefill replica; see :class:`slos_serve.policies.base.Policy`.

    Args:
        model: batch-time model, for the batch length at which compute saturates.
    """

    def __init__(self, model: BatchTimeModel) -> None:
        self._token_budget = saturating_tokens(model)

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Whole prompts in order, up to the saturating length; one that is longer runs alone."""
        rest = rest_of_prompt(view)
        if rest is not None:
            return rest
        out = room_for(view)
        room = room_of(view, self._token_budget)
        most = view.max_num_batched_tokens
        return batch_plan(out, whole_prompts(view.table.rows, view.waiting, len(view.running), room, most, out))


class DistServeDecode(StockPolicy):
    """Policy of a decode replica; see :class:`slos_serve.policies.base.Policy`.

    Args:
        token_budget: most tokens in a step; only a request preempted for memory computes many.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(self, token_budget: int = 8192, draft_tokens: int = 0) -> None:
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._token_budget = checked_tokens("token_budget", token_budget)

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Everything that runs, then what has arrived."""
        out = room_for(view)
        room = room_of(view, self._token_budget)
        count = chunked(view.table.rows, view.running, view.waiting, room, self._draft_tokens, out)
        return batch_plan(out, count)
