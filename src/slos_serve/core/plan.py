"""What a policy sees of an engine and what it answers: the view and the step plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.request import RequestTable, SlotArray


class Reason(IntEnum):
    """Why a request got the tokens it got in a step."""

    DECODE_DUE = 0
    """Its next token would be late if it waited for the next batch."""
    PREFILL_DEADLINE = 1
    """Prefill chunk, in order of first-token deadline."""
    DECODE_EARLY = 2
    """Could wait; there was room."""
    BEST_EFFORT = 3
    """No promise, or one that was lost; there was room."""
    STOCK_ORDER = 4
    """The engine's own order (a baseline policy or a fallback)."""
    HELD_AHEAD = 5
    """Decode held out of this step: it is ahead of its deadlines and the room serves others better."""
    NO_ROOM = 6
    """Nothing left in this step's token budget."""
    NOT_ADMITTED = 7
    """Admitting it now would break a promise already made; asked again at the next plan."""
    NO_MEMORY = 8
    """The KV cache has no room for it."""
    PREEMPTED_FOR_SLO = 9
    """Best effort, preempted because an SLO request needs its memory."""


@dataclass(slots=True)
class EngineView:
    """State of one engine (replica) at the start of a step.

    Attributes:
        table: every unfinished request.
        running: slots that hold KV, in the engine's own order.
        waiting: slots that hold none, in the engine's own order.
        free_blocks, total_blocks: KV blocks, free ones including evictable prefix-cache blocks.
        block_size: tokens a block.
        max_num_seqs: most requests in ``running``.
        max_num_batched_tokens: most tokens a step may hold.
        max_adapters: most different LoRA adapters among ``running``, held requests included; 0 for no limit.
        chunk_multiple: a prefill chunk that does not end its prompt must end at a multiple of this many computed
            tokens (Mamba's block alignment); 1 for no such rule.
        prefill_threshold: most prefill tokens of one request in a step; 0 for no limit.
        plan_ahead: each step is planned while the one before it runs (async scheduling), so a request that arrives
            meanwhile waits for both.
    """

    table: RequestTable
    running: SlotArray
    waiting: SlotArray
    free_blocks: int
    total_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_adapters: int = 0
    chunk_multiple: int = 1
    prefill_threshold: int = 0
    plan_ahead: bool = False

    def without_requests(self) -> EngineView:
        """The same engine with nothing in it."""
        return replace(self, running=_no_slots(), waiting=_no_slots(), free_blocks=self.total_blocks)


def _no_slots() -> SlotArray:
    return np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class StepPlan:
    """One step: who runs with how many tokens, in order, and why.

    Attributes:
        slots: int64 [k], requests that run, running ones before waiting ones.
        tokens: int64 [k], new tokens of each, all > 0.
        reasons: int64 [k], :class:`Reason` of each.
        held: int64 [h], running requests that get nothing in this step.
        held_reasons: int64 [h].
        preempt: slots to preempt before the step (best effort giving way).
        admitted: slots whose promise this plan makes (first tokens of their prefill are in it).
        demoted: slots that lose their promise with this plan.
        rejected: waiting slots to drop unserved (policies that decline instead of serving best effort).
        predicted_s: predicted duration of the step in seconds.
        draft_tokens: draft length of each entry of ``slots``; empty without speculation.
    """

    slots: SlotArray = field(default_factory=_no_slots)
    tokens: SlotArray = field(default_factory=_no_slots)
    reasons: NDArray[np.int64] = field(default_factory=_no_slots)
    held: SlotArray = field(default_factory=_no_slots)
    held_reasons: NDArray[np.int64] = field(default_factory=_no_slots)
    preempt: SlotArray = field(default_factory=_no_slots)
    admitted: SlotArray = field(default_factory=_no_slots)
    demoted: SlotArray = field(default_factory=_no_slots)
    predicted_s: float = 0.0
    draft_tokens: SlotArray = field(default_factory=_no_slots)
    rejected: SlotArray = field(default_factory=_no_slots)

    @property
    def num_tokens(self) -> int:
        """Tokens in the step."""
        return int(self.tokens.sum())
