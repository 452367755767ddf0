"""KV blocks that a request needs, counted per KV-cache group with each group's own need.

vLLM gives every group of layers blocks of one shared pool. Full attention keeps a block for every ``block_size``
tokens; a sliding window, chunked attention or Mamba state stops growing. The planner counts in *growing blocks*: one
is what all growing groups together take for ``block_size`` tokens. The rest of a request's need is fixed and is
charged when it starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slos_serve.vllm_plugin import compat_kv

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

# A group whose blocks stop growing, by the attribute of its spec that says where.
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True, slots=True)
class _Group:
    """One group that does not grow: ``most_blocks`` at most, ``block_size`` tokens each."""

    block_size: int
    most_blocks: int


class KVNeeds:
    """Block arithmetic of one engine.

    Attributes:
        block_size: tokens a growing block.
        pool_blocks_each: pool blocks that one growing block stands for.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.block_size = int(scheduler.block_size)
        growing, self._fixed = _split(scheduler)
        self.pool_blocks_each = sum(self.block_size / size for size in growing)
        if not growing:  # nothing grows with the tokens (Mamba alone): one block is enough for any length
            self.block_size, self.pool_blocks_each = 2 * int(scheduler.max_model_len), 1.0

    def free_blocks(self) -> int:
        """Growing blocks that can be had now; blocks whose freeing is deferred are not counted."""
        return int(compat_kv.free_pool_blocks(self._scheduler) / self.pool_blocks_each)

    def total_blocks(self) -> int:
        """Growing blocks in all."""
        return int(compat_kv.total_pool_blocks(self._scheduler) / self.pool_blocks_each)

    def fixed_blocks(self, num_tokens: int) -> int:
        """Growing blocks' worth of what a request of ``num_tokens`` takes in groups that do not grow."""
        pool = sum(min(-(-num_tokens // group.block_size), group.most_blocks) for group in self._fixed)
        return math.ceil(pool / self.pool_blocks_each)

    def load_blocks(self, request: Request) -> int:
        """Growing blocks that loading a request's KV from elsewhere takes."""
        return -(-int(request.num_tokens) // self.block_size) + self.fixed_blocks(int(request.num_tokens))


def _split(scheduler: Scheduler) -> tuple[list[int], list[_Group]]:
    """Block sizes of the groups that grow, and the groups that do not."""
    growing: list[int] = []
    fixed: list[_Group] = []
    managers = getattr(scheduler.kv_cache_manager.coordinator, "single_type_managers", ())
    for index, group in enumerate(scheduler.kv_cache_config.kv_cache_groups):
        spec: Any = group.kv_cache_spec
        size = int(
            getattr(managers[index], "block_size", spec.block_size) if index < len(managers) else spec.block_size
        )
        most = _most_blocks(spec, size, int(scheduler.scheduler_config.max_num_batched_tokens))
        if most is None:
            growing.append(size)
        else:
            fixed.append(_Group(size, most))
    return growing, fixed


def _most_blocks(spec: Any, block_size: int, max_num_batched_tokens: int) -> int | None:
    """Blocks at which a group's need of one request ends; ``None`` where it grows with the tokens."""
    kind = type(spec).__name__
    if "Mamba" in kind:
        return 2 + int(getattr(spec, "num_speculative_blocks", 0))
    if "FullAttention" in kind or ("MLAAttention" in kind and "Sliding" not in kind):
        return None
    for name in _WINDOWS:
        window = getattr(spec, name, None)
        if window:
            return -(-(int(window) - 1 + max_num_batched_tokens) // block_size) + 1
    return None
