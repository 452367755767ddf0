"""The engine's limits as the planner counts them: slots, tokens, KV blocks, adapters, chunk rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slos_serve.core.plan import EngineView
from slos_serve.core.request import RequestTable, SlotArray
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.kv_needs import KVNeeds

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

# Without chunked prefill a prompt is computed whole: no chunk ends at a multiple of so many tokens.
_WHOLE_PROMPTS = 1 << 40


class EngineLimits:
    """Limits of one engine.

    Attributes:
        needs: its KV arithmetic.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.needs = KVNeeds(scheduler)
        self._scheduler = scheduler
        self._adapters = compat.most_adapters(scheduler)
        self._draft_slots = compat.draft_slots(scheduler)
        self._chunk_multiple = _chunk_multiple(scheduler)

    def view(self, table: RequestTable, running: SlotArray, waiting: SlotArray) -> EngineView:
        """The engine now, with these requests in it."""
        scheduler = self._scheduler
        most_running = compat.most_running(scheduler)
        return EngineView(
            table=table,
            running=running,
            waiting=waiting,
            free_blocks=self.needs.free_blocks(),
            total_blocks=self.needs.total_blocks(),
            block_size=self.needs.block_size,
            max_num_seqs=most_running,
            max_num_batched_tokens=self._most_tokens(len(running), most_running),
            max_adapters=self._adapters,
            chunk_multiple=self._chunk_multiple,
            prefill_threshold=compat.prefill_threshold(scheduler),
            plan_ahead=bool(scheduler.scheduler_config.async_scheduling),
        )

    def _most_tokens(self, num_running: int, most_running: int) -> int:
        """Tokens of a step beside the input slots that a drafter takes for each request."""
        most = int(self._scheduler.max_num_scheduled_tokens)
        if not self._draft_slots:
            return most
        inputs = int(self._scheduler.scheduler_config.max_num_batched_tokens)
        return max(min(most, inputs - self._draft_slots * min(num_running + 8, most_running)), 1)


def _chunk_multiple(scheduler: Scheduler) -> int:
    """Computed tokens that a chunk which does not end its prompt must end at a multiple of."""
    if not scheduler.scheduler_config.enable_chunked_prefill:
        return _WHOLE_PROMPTS
    if getattr(scheduler, "need_mamba_block_aligned_split", False):
        block = int(scheduler.cache_config.block_size)
        return block if block <= scheduler.max_num_scheduled_tokens else 1
    return 1
