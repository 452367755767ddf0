"""Every private name of vLLM that the plug-in touches, and the check that they are there.

vLLM's scheduler is not a public interface and changes every release. Nothing else in the plug-in reaches past a public
name; what is needed is wrapped here, and looked for once at start so that a release that lacks it is refused with one
message instead of failing under load.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.request import RequestStatus

from slos_serve.core.errors import UnsupportedEngineError

if TYPE_CHECKING:
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

OLDEST = (0, 26)
NEWEST = (0, 33)
_METHODS = (
    "schedule",
    "update_from_output",
    "add_request",
    "finish_requests",
    "_preempt_request",
    "_free_request",
)
_ATTRIBUTES = (
    "running",
    "waiting",
    "requests",
    "max_num_scheduled_tokens",
    "max_num_running_reqs",
    "max_model_len",
    "kv_cache_manager",
    "kv_cache_config",
    "block_size",
    "scheduler_config",
    "vllm_config",
)


def engine_version() -> str:
    """Version of the vLLM that is imported."""
    return str(vllm.__version__)


def check_version(version: str) -> None:
    """Refuse a vLLM outside the supported range.

    Raises:
        UnsupportedEngineError: with the range and what was found.
    """
    parts = version.partition("+")[0].split(".")
    try:
        found = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        found = (0, 0)
    if not OLDEST <= found <= NEWEST:
        raise UnsupportedEngineError(
            f"slos-serve supports vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}; this is vLLM {version}. "
            "Install a supported vLLM, or start the server without --scheduler-cls."
        )


def check_scheduler(scheduler: AsyncScheduler) -> None:
    """Refuse a scheduler that lacks a name the plug-in steers by, or orders requests by priority itself.

    Raises:
        UnsupportedEngineError: naming what is missing.
    """
    missing = [name for name in (*_METHODS, *_ATTRIBUTES) if not hasattr(scheduler, name)]
    if missing:
        raise UnsupportedEngineError(
            f"vLLM {engine_version()} lacks what slos-serve steers by: {', '.join(missing)} of its scheduler."
        )
    policy = scheduler.scheduler_config.policy
    if policy != "fcfs":
        raise UnsupportedEngineError(
            f"--scheduling-policy: got {policy!r}; allowed: 'fcfs'. SLOScheduler orders requests by their promises; "
            "give classes weights instead of priorities."
        )


def is_paused(scheduler: AsyncScheduler) -> bool:
    """True while the engine is paused (sleep, weight update): its own order must hold."""
    state = getattr(scheduler, "_pause_state", None)
    return state is not None and state.name != "UNPAUSED"


def is_plannable(request: Request) -> bool:
    """True for a waiting request that could start now (not one that waits for a grammar, remote KV or input)."""
    return request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def tokens_in_flight(request: Request) -> int:
    """Output tokens that steps in flight will produce."""
    return int(request.num_output_placeholders)


def most_drafts(scheduler: AsyncScheduler) -> int:
    """Draft tokens that the engine's drafter makes for a request; 0 without speculation."""
    return int(getattr(scheduler, "num_spec_tokens", 0))


def keep_drafts(request: Request, count: int) -> None:
    """Let a request verify only the first ``count`` of its drafts in the next step.

    Under async scheduling the list is one that all requests share, so it is replaced, never changed.
    """
    if len(request.spec_token_ids) > count:
        request.spec_token_ids = request.spec_token_ids[:count]


def sampled_tokens(output: ModelRunnerOutput, request_id: str) -> int:
    """Tokens that a step brought for a request, drafts that were right included; 0 when it sampled nothing."""
    tokens = output.sampled_token_ids
    return len(tokens[output.req_id_to_index[request_id]]) if tokens else 0


def preempt(scheduler: AsyncScheduler, request: Request, timestamp_s: float) -> None:
    """Take a running request's KV away; its generated tokens are kept and it waits again."""
    scheduler.running.remove(request)
    scheduler._preempt_request(request, timestamp_s)


def queue_of(requests: Iterable[Request]) -> RequestQueue:
    """A first-come-first-served queue in the given order."""
    queue = FCFSRequestQueue()
    queue.extend(requests)
    return queue


def free_blocks(scheduler: AsyncScheduler) -> int:
    """KV blocks that can be had, evictable prefix-cache blocks included, per sequence group."""
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks()) // _groups(scheduler)


def total_blocks(scheduler: AsyncScheduler) -> int:
    """KV blocks in all, the pool's reserved null block left out, per sequence group."""
    return (int(scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1) // _groups(scheduler)


def _groups(scheduler: AsyncScheduler) -> int:
    return max(len(scheduler.kv_cache_config.kv_cache_groups), 1)


def cached_tokens(scheduler: AsyncScheduler, request: Request) -> int:
    """Prompt tokens that the prefix cache holds now; leaves vLLM's hit statistics alone."""
    manager = scheduler.kv_cache_manager
    if not getattr(manager, "enable_caching", False) or request.skip_reading_prefix_cache:
        return 0
    hit = manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)
    return int(hit[1])


def finish_kind(request: Request) -> str:
    """``stop``, ``length``, ``abort`` or ``error``: how a finished request ended."""
    reason = request.get_finished_reason()
    return "error" if reason is None else str(reason)
