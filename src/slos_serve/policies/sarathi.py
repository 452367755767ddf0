"""Sarathi-Serve: every step carries all decodes and fills a fixed token budget with prefill chunks.

The chunk bounds the length of a step, so decodes are never stalled by a prompt; it is the same whatever is promised.
The paper tunes it to the tightest TPOT: 256 to 2,048 are tried here. A prompt starts when all of its blocks are
free. Source: Agrawal et al., OSDI 2024 (arXiv 2403.02310), algorithm 3.
"""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import RequestArray
from slos_serve.perf.jit import in_place
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    IntArray,
    batch_plan,
    checked_draft_tokens,
    checked_tokens,
    chunked,
    room_for,
    room_of,
    tokens_left,
)

WATERMARK = 0.01


@in_place
def decodes_first(rows: RequestArray, running: IntArray, ordered: IntArray) -> None:
    """Running requests with decodes ahead of prefills, each group in its order."""
    count = 0
    for slot in running:
        if tokens_left(rows, slot) == 1:
            ordered[count] = slot
            count += 1
    for slot in running:
        if tokens_left(rows, slot) > 1:
            ordered[count] = slot
            count += 1


class Sarathi(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        chunk_tokens: tokens of a step, decodes included.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(self, chunk_tokens: int = 512, draft_tokens: int = 0) -> None:
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._chunk_tokens = checked_tokens("chunk_tokens", chunk_tokens)

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """All decodes, then chunks of running prompts, then new prompts."""
        rows, out = view.table.rows, room_for(view)
        ordered = np.empty(len(view.running), dtype=np.int64)
        decodes_first(rows, view.running, ordered)
        room = room_of(view, self._chunk_tokens, WATERMARK)
        return batch_plan(out, chunked(rows, ordered, view.waiting, room, self._draft_tokens, out))
