"""The state of an engine at the end of the step that was just planned: what its next plan will start from.

Nothing new can start before then, so that is the state worth publishing. Answers whose length nobody knows are taken to
go on.
"""

from __future__ import annotations

import copy

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import RequestArray, RequestTable, SlotArray, Status
from slos_serve.perf.jit import in_place


@in_place
def carry_out(rows: RequestArray, slots: SlotArray, tokens: SlotArray, drafts: SlotArray, end_s: float) -> None:
    """Advance the planned requests to the end of their step; a draft is taken to yield nothing."""
    for i in range(len(slots)):
        slot = slots[i]
        if rows["running"][slot] == 0:
            rows["running"][slot] = 1
            rows["computed_tokens"][slot] += rows["cached_tokens"][slot]
        total = rows["prompt_tokens"][slot] + rows["output_tokens"][slot]
        done = rows["computed_tokens"][slot] + tokens[i] - (drafts[i] if len(drafts) > 0 else 0)
        rows["computed_tokens"][slot] = min(done, total)
        if done < total:
            continue
        if rows["stage_tokens"][slot] == 0:
            rows["stage_start_s"][slot] = end_s
        rows["output_tokens"][slot] += 1
        rows["stage_tokens"][slot] += 1
        rows["last_token_s"][slot] = end_s


def view_copy(view: EngineView) -> EngineView:
    """The same state in rows of its own, to be read and changed but not added to."""
    copied = copy.copy(view)
    copied.table = RequestTable(1)
    copied.table.rows = view.table.rows.copy()
    return copied


def after_step(view: EngineView, plan: StepPlan, end_s: float) -> EngineView:
    """A copy of ``view``, the planned step carried out and ended at ``end_s``."""
    after = view_copy(view)
    rows = after.table.rows
    rows["status"][plan.admitted], rows["status"][plan.demoted] = Status.ADMITTED, Status.BEST_EFFORT
    for slots in (plan.preempt, plan.rejected):
        rows["running"][slots] = 0
    rows["computed_tokens"][plan.preempt] = 0
    rows["cached_tokens"][plan.preempt] = 0
    carry_out(rows, plan.slots, plan.tokens, plan.draft_tokens, end_s)
    active = np.concatenate((view.running, view.waiting))
    going_on = rows["output_tokens"][active] < rows["max_tokens"][active]
    active = active[going_on & ~np.isin(active, plan.rejected)]
    runs = rows["running"][active] == 1
    after.running, after.waiting = active[runs], active[~runs]
    return after
