"""What the plug-in reads of vLLM's KV cache and KV connector: free blocks, and what of a prompt is computed already.

The names are checked at start with those of :mod:`slos_serve.vllm_plugin.compat`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def free_pool_blocks(scheduler: Scheduler) -> int:
    """KV blocks of the pool that can be had now, evictable prefix-cache blocks included."""
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def total_pool_blocks(scheduler: Scheduler) -> int:
    """KV blocks of the pool, its reserved null block left out."""
    return int(scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1


def reserved_pool_blocks(scheduler: Scheduler) -> int | None:
    """KV blocks that prompts in progress, loads among them, still need: vLLM begins no load that would take them.

    ``None`` for releases without that rule.
    """
    needs = getattr(scheduler, "_inflight_prefill_reserved_blocks", None)
    if needs is None:
        return None
    step = getattr(scheduler, "_spec_decode_step_blocks", 0)  # 0.31: a method, 0.32: a number
    return int(needs()) + int(step() if callable(step) else step)


class LocalHits:
    """Look-ups in the prefix cache of one scheduler. vLLM's hit statistics are left alone."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._caches = bool(getattr(scheduler.kv_cache_manager, "enable_caching", False))
        self._hashes_blocks = _hashes_blocks(scheduler)
        self._size = int(scheduler.block_size)

    def find(self, request: Request, before: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Prompt tokens that the engine's own cache holds now, and how many of them running requests hold as well.

        Blocks of the latter are shared: they take nothing from the pool.

        Args:
            request: waits to start.
            before: the answer of an earlier look-up, where the search begins.
        """
        if not self._caches or request.skip_reading_prefix_cache:
            return 0, 0
        if self._hashes_blocks:
            return self._cached_prefix(request, before)
        scheduler = self._scheduler
        hit = scheduler.kv_cache_manager.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        replayed = int(getattr(scheduler, "prefix_replay_tokens", 0))  # computed anew after a hit
        return max(int(hit[1]) - replayed, 0), 0

    def _cached_prefix(self, request: Request, before: tuple[int, int]) -> tuple[int, int]:
        """Cached and shared prefix by bisection: vLLM evicts a prefix from its end, so both are beginnings."""
        cached, hashes = self._scheduler.kv_cache_manager.block_pool.get_cached_block, request.block_hashes
        size = self._size

        def found(count: int) -> bool:
            return cached(hashes[count - 1], [0]) is not None

        def shared(count: int) -> bool:
            blocks = cached(hashes[count - 1], [0])
            return blocks is not None and blocks[0].ref_cnt > 0

        most = _largest(min(len(hashes), (request.num_tokens - 1) // size), found, before[0] // size)
        if not most:
            return 0, 0
        return most * size, _largest(most, shared, before[1] // size) * size


def _hashes_blocks(scheduler: Scheduler) -> bool:
    """Whether there is one group of layers, every hash stands for one of its blocks, and a hit is taken as it is."""
    if len(scheduler.kv_cache_config.kv_cache_groups) > 1 or int(getattr(scheduler, "prefix_replay_tokens", 0)):
        return False
    return bool(getattr(scheduler, "hash_block_size", scheduler.block_size) == scheduler.block_size)


def _largest(high: int, holds: Callable[[int], bool], guess: int) -> int:
    """Largest count in [0, high] for which ``holds``; it holds for every smaller count then, and for 0.

    The search begins at ``guess``: where that is right, two questions are enough.
    """
    low, guess = 0, min(guess, high)
    if guess and not holds(guess):
        high = guess - 1
    elif guess < high:
        low = guess
        if holds(guess + 1):
            low = guess + 1
        else:
            high = guess
    else:
        low = high
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def external_hit(scheduler: Scheduler, request: Request, local_tokens: int) -> tuple[int | None, bool]:
    """What the KV connector would load beyond ``local_tokens``, and whether it loads between steps.

    ``None`` tokens: the connector does not know yet. vLLM's connectors are asked as often as a request is looked at.
    """
    aligned = local_tokens - local_tokens % scheduler.block_size
    tokens, asynchronous = scheduler.connector.get_num_new_matched_tokens(request, aligned)
    return tokens, bool(asynchronous)
