"""KV blocks that a request needs, counted per KV-cache group with each group's own need.

vLLM gives every group of layers blocks of one shared pool. Full attention keeps a block for every ``block_size``
tokens; a sliding window, chunked attention or Mamba state stops growing. The planner counts in *growing blocks*: one
is what all growing groups together take for ``block_size`` tokens. The rest of a request's need is fixed and is
charged when it starts. A window holds a whole chunk of a prompt beside itself; once the prompt is computed vLLM frees
that, and the request is charged the window alone.
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

# Steps whose tokens may be in flight at once.
_IN_FLIGHT_STEPS = 4


@dataclass(frozen=True, slots=True)
class _Group:
    """One group that does not grow: blocks of ``block_size`` tokens, so many at most in prompts and in decodes."""

    block_size: int
    prompt_blocks: int
    decode_blocks: int


class KVNeeds:
    """Block arithmetic of one engine.

    Attributes:
        block_size: tokens a growing block.
        pool_blocks_each: pool blocks that one growing block stands for.
        shrinks: whether a request gives blocks back once its prompt is computed.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.block_size = int(scheduler.block_size)
        growing, self._fixed = _split(scheduler)
        self.shrinks = any(group.decode_blocks < group.prompt_blocks for group in self._fixed)
        self.pool_blocks_each = sum(self.block_size / size for size in growing)
        if not growing:  # nothing grows with the tokens (Mamba alone): one block is enough for any length
            self.block_size, self.pool_blocks_each = 2 * int(scheduler.max_model_len), 1.0

    def free_blocks(self) -> int:
        """Growing blocks that can be had now; blocks whose freeing is deferred are not counted."""
        return int(compat_kv.free_pool_blocks(self._scheduler) / self.pool_blocks_each)

    def unreserved_blocks(self) -> tuple[int, bool]:
        """Growing blocks that a load may take; whether what prompts in progress still need is left out of them."""
        free, reserved = compat_kv.free_pool_blocks(self._scheduler), compat_kv.reserved_pool_blocks(self._scheduler)
        return int((free - (reserved or 0)) / self.pool_blocks_each), reserved is not None

    def total_blocks(self) -> int:
        """Growing blocks in all."""
        return int(compat_kv.total_pool_blocks(self._scheduler) / self.pool_blocks_each)

    def fixed_blocks(self, num_tokens: int) -> int:
        """Growing blocks' worth of what a request of ``num_tokens`` takes in groups that do not grow."""
        pool = sum(min(-(-num_tokens // group.block_size), group.prompt_blocks) for group in self._fixed)
        return math.ceil(pool / self.pool_blocks_each)

    def decode_blocks(self, num_tokens: int) -> int:
        """As :meth:`fixed_blocks`, once the prompt of the request is computed."""
        pool = sum(min(-(-num_tokens // group.block_size), group.decode_blocks) for group in self._fixed)
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
        config = scheduler.scheduler_config
        most = [
            _most_blocks(spec, size, tokens)
            for tokens in (int(config.max_num_batched_tokens), _IN_FLIGHT_STEPS * (1 + int(scheduler.num_spec_tokens)))
        ]
        if most[0] is None or most[1] is None:
            growing.append(size)
        else:
            fixed.append(_Group(size, most[0], most[1]))
    return growing, fixed


def _most_blocks(spec: Any, block_size: int, tokens: int) -> int | None:
    """Blocks at which a group's need of one request ends; ``None`` where it grows with the tokens.

    Args:
        spec: the group's.
        block_size: its tokens a block.
        tokens: in flight at most, which a window holds beside itself.
    """
    kind = type(spec).__name__
    if "Mamba" in kind:
        return 2 + int(getattr(spec, "num_speculative_blocks", 0))
    if "FullAttention" in kind or ("MLAAttention" in kind and "Sliding" not in kind):
        return None
    for name in _WINDOWS:
        window = getattr(spec, name, None)
        if window:
            return -(-(int(window) - 1 + tokens) // block_size) + 1
    return None
