"""Earliest deadline first: all decodes, then prefill chunks in order of first-token deadline, in a fixed token budget.

The textbook answer to deadlines, and what a priority queue in front of a chunked engine amounts to. It admits everyone,
so under overload it works on requests that are late already (the domino effect); ``drop_late`` puts those last.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.request import RequestArray
from slos_serve.core.slo import check_number
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    IntArray,
    blocks_of,
    checked_draft_tokens,
    drafts_for,
    step_plan,
    tokens_left,
)


@njit(cache=True)
def by_deadline(
    rows: RequestArray,
    running: IntArray,
    ordered: IntArray,
    token_budget: int,
    max_num_seqs: int,
    free_blocks: int,
    block_size: int,
    slots: IntArray,
    tokens: IntArray,
    draft_tokens: int,
    drafts: IntArray,
) -> int:
    """Decodes of ``running``, then prefills of ``ordered`` (running and waiting ones); returns the entries written."""
    count = 0
    for slot in running:
        if tokens_left(rows, slot) == 1 and token_budget > 0:
            draft = drafts_for(rows, slot, draft_tokens, token_budget)
            free_blocks -= blocks_of(rows["computed_tokens"][slot] + 1 + draft, block_size)
            free_blocks += blocks_of(rows["computed_tokens"][slot], block_size)
            slots[count], tokens[count], drafts[count] = slot, 1 + draft, draft
            token_budget -= 1 + draft
            count += 1
    num_running = len(running)
    for slot in ordered:
        left = tokens_left(rows, slot)
        if token_budget <= 0:
            break
        done = rows["computed_tokens"][slot] if rows["running"][slot] else 0
        if rows["running"][slot] == 0:
            whole = blocks_of(rows["prompt_tokens"][slot] + rows["output_tokens"][slot], block_size)
            if num_running >= max_num_seqs or whole > free_blocks:
                continue
            num_running += 1
        elif left == 1:
            continue
        chunk = min(left, token_budget)
        after = rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - left + chunk
        free_blocks -= blocks_of(after, block_size) - blocks_of(done, block_size)
        slots[count], tokens[count], drafts[count] = slot, chunk, 0
        token_budget -= chunk
        count += 1
    return count


class EarliestDeadlineFirst(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        token_budget: most tokens in a step.
        drop_late: requests whose first token is late already come after all others.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(self, token_budget: int = 2048, drop_late: bool = False, draft_tokens: int = 0) -> None:
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._token_budget = int(check_number("token_budget", token_budget, low=1, high=1e6, low_included=True))
        self._drop_late = drop_late

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Fill the budget in order of deadline."""
        rows = view.table.rows
        everyone = np.concatenate((view.running, view.waiting))
        due_s = rows["ttft_due_s"][everyone]
        late = (due_s < now_s) & (rows["output_tokens"][everyone] == 0) & self._drop_late
        ordered = everyone[np.lexsort((rows["order"][everyone], due_s, late))]
        slots, tokens, drafts = np.empty((3, 2 * len(everyone)), dtype=np.int64)
        count = by_deadline(
            rows,
            view.running,
            ordered,
            min(self._token_budget, view.max_num_batched_tokens),
            view.max_num_seqs,
            view.free_blocks,
            view.block_size,
            slots,
            tokens,
            self._draft_tokens,
            drafts,
        )
        starts = rows["running"][slots[:count]] == 0
        first = np.argsort(starts, kind="stable")  # running ones before waiting ones, as a plan must have them
        return step_plan(slots[:count][first], tokens[:count][first], Reason.PREFILL_DEADLINE, drafts[:count][first])
