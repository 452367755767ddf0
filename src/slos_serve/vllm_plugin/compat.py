"""Every private name of vLLM that the plug-in touches, and the check that they are there.

vLLM's scheduler is not a public interface and changes every release. Only this file, ``compat_counters.py`` and
``compat_kv.py`` reach past a public name. :func:`missing_names` looks for each name at start;
:mod:`slos_serve.vllm_plugin.capabilities` says what follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import vllm
from numpy.typing import NDArray
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput

IntArray = NDArray[np.int64]
OLDEST = (0, 26)
NEWEST = (0, 33)
# Waiting requests that vLLM looks at before its queue ``waiting``: the name since 0.31, and the one before.
FIRST_QUEUES = ("kv_holding_waiting", "skipped_waiting")
# What vLLM promotes a blocked waiting request with: the name since 0.31, and the one before.
PROMOTERS = ("_handle_blocked_waiting_request", "_try_promote_blocked_waiting_request")
_SCHEDULER_NAMES = (
    "schedule",
    "update_from_output",
    "add_request",
    "finish_requests",
    "get_request_counts",
    "_preempt_request",
    "_free_request",
    "_is_blocked_waiting_status",
    "_pause_state",
    "running",
    "waiting",
    "requests",
    "max_num_scheduled_tokens",
    "max_num_running_reqs",
    "max_model_len",
    "num_spec_tokens",
    "num_waiting_for_streaming_input",
    "current_step",
    "connector",
    "lora_config",
    "kv_cache_manager",
    "kv_cache_config",
    "cache_config",
    "block_size",
    "scheduler_config",
    "vllm_config",
)
_MANAGER_NAMES = (
    "coordinator.find_longest_cache_hit",
    "block_pool.get_cached_block",
    "block_pool.get_num_free_blocks",
    "block_pool.num_gpu_blocks",
)
_REQUEST_NAMES = (
    "num_output_placeholders",
    "num_in_flight_tokens",
    "next_decode_eligible_step",
    "spec_token_ids",
    "block_hashes",
    "skip_reading_prefix_cache",
    "num_preemptions",
    "num_prompt_tokens",
    "num_computed_tokens",
    "num_tokens",
    "num_tokens_with_spec",
    "num_output_tokens",
    "output_token_ids",
    "_output_token_ids",
    "_all_token_ids",
    "mm_features",
    "lora_request",
    "resumable",
    "get_finished_reason",
)
# Not in every supported release; used where they are.
# Output of a preempted request that is still in flight; since 0.29.
_HAS_STALE_OUTPUT = "num_stale_output_tokens" in Request.__init__.__code__.co_names
_NOT_YET_IN_26 = frozenset({"num_in_flight_tokens"})


def engine_version() -> str:
    """Version of the vLLM that is imported."""
    return str(vllm.__version__)


def version_of(text: str) -> tuple[int, int]:
    """Major and minor number of a version; (0, 0) when it cannot be read."""
    parts = text.partition("+")[0].split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        return 0, 0


def missing_names(scheduler: Scheduler) -> list[str]:
    """Private names that the plug-in steers by and this vLLM lacks, as ``object.name``."""
    missing = [f"Scheduler.{name}" for name in _SCHEDULER_NAMES if not hasattr(scheduler, name)]
    missing += [
        f"Scheduler.{names[0]}"
        for names in (FIRST_QUEUES, PROMOTERS)
        if not any(hasattr(scheduler, name) for name in names)
    ]
    for path in _MANAGER_NAMES:
        found: Any = getattr(scheduler, "kv_cache_manager", None)
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is None:
            missing.append(f"KVCacheManager.{path}")
    probe = probe_request()
    missing += [f"Request.{name}" for name in _REQUEST_NAMES if name not in _NOT_YET_IN_26 and not hasattr(probe, name)]
    return missing


def probe_request(request_id: str = "slos-serve-probe") -> Request:
    """A request of one token that no engine runs: for the check of names and for the dry plan at start."""
    from vllm.sampling_params import SamplingParams  # noqa: PLC0415

    return Request(
        request_id=request_id,
        prompt_token_ids=[0],
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
    )


# Queues ---------------------------------------------------------------------------------------------------


def first_queue_name(scheduler: Scheduler) -> str:
    """Attribute of the queue that vLLM empties before ``waiting``."""
    return next(name for name in FIRST_QUEUES if hasattr(scheduler, name))


def queue_of(requests: Iterable[Request]) -> RequestQueue:
    """A first-come-first-served queue in the given order."""
    queue = FCFSRequestQueue()
    queue.extend(requests)
    return queue


def is_blocked(scheduler: Scheduler, request: Request) -> bool:
    """True for a waiting request that waits for a grammar, remote KV or streaming input rather than for a turn."""
    return bool(scheduler._is_blocked_waiting_status(request.status))


def promote(scheduler: Scheduler, request: Request) -> bool:
    """Apply vLLM's own rule to a blocked waiting request; whether it may run now."""
    name = next(name for name in PROMOTERS if hasattr(scheduler, name))
    return bool(getattr(scheduler, name)(request))


def may_start(request: Request) -> bool:
    """True for a waiting request that vLLM would start now: no stale output of it is still to be delivered."""
    if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
        return False
    return not _HAS_STALE_OUTPUT or not request.num_stale_output_tokens or bool(request.drop_stale_output)


def loads_kv(request: Request) -> bool:
    """True while KV of a waiting request is on its way from another engine or tier."""
    return bool(request.status == RequestStatus.WAITING_FOR_REMOTE_KVS)


def holds_slot(request: Request) -> bool:
    """True for a streaming-input session that waits for a turn: the worker has kept its slot since its last one."""
    return bool(request.resumable and request.num_computed_tokens and may_start(request))


def is_parked(request: Request) -> bool:
    """True while a streaming-input session waits for its next chunk: it keeps its KV and its worker slot."""
    return bool(request.status == RequestStatus.WAITING_FOR_STREAMING_REQ)


# The engine's limits --------------------------------------------------------------------------------------


def is_paused(scheduler: Scheduler) -> bool:
    """True while the engine is paused (sleep, weight update): its own order must hold."""
    return bool(scheduler._pause_state.name != "UNPAUSED")


def most_running(scheduler: Scheduler) -> int:
    """Most requests that may run: worker slots, or ``--max-num-active-seqs``, less the slots of parked sessions."""
    most = min(
        scheduler.max_num_running_reqs, getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
    )
    return int(most) - int(scheduler.num_waiting_for_streaming_input)


def active_limit_name(scheduler: Scheduler) -> str:
    """Attribute that vLLM compares the number of running requests with before it starts another."""
    return "max_num_active_reqs" if hasattr(scheduler, "max_num_active_reqs") else "max_num_running_reqs"


def draft_slots(scheduler: Scheduler) -> int:
    """Input slots that the drafter takes for each scheduled request beside its tokens."""
    speculative = scheduler.vllm_config.speculative_config
    return int(getattr(speculative, "max_num_new_slots_for_drafting", 0)) if speculative is not None else 0


def pads_starts(scheduler: Scheduler) -> bool:
    """Whether vLLM pads a start of one token to one token and all drafts."""
    return bool(scheduler.num_spec_tokens > 0 and getattr(scheduler, "dynamic_sd_lookup", None) is None)


def most_drafts(scheduler: Scheduler) -> int:
    """Draft tokens that the engine's drafter makes for a request; 0 without speculation."""
    return int(scheduler.num_spec_tokens)


def most_adapters(scheduler: Scheduler) -> int:
    """Most different LoRA adapters in a batch; 0 where there are none."""
    return int(scheduler.lora_config.max_loras) if scheduler.lora_config else 0


def adapter_of(request: Request) -> int:
    """The LoRA adapter that a request needs; 0 for none."""
    return int(request.lora_request.lora_int_id) if request.lora_request else 0


def defers_prefills(scheduler: Scheduler, throttle_prefills: bool) -> bool:
    """Whether vLLM may leave prompts out of this step: data-parallel balancing, or its cadence on one engine (0.33)."""
    if getattr(scheduler, "local_prefill_interval", 1) > 1:
        return True
    return bool(throttle_prefills and not getattr(scheduler, "prefill_capacity_bound", False))


def note_waiting(scheduler: Scheduler) -> None:
    """After a steered step: let data-parallel balancing see the whole queues, as after a stock step."""
    if not hasattr(scheduler, "prefill_capacity_bound"):
        return
    if hasattr(scheduler, "deferred_waiting"):
        _, num_waiting = scheduler.get_request_counts()
        scheduler.prefill_capacity_bound = num_waiting > len(scheduler.deferred_waiting)
    else:
        scheduler.prefill_capacity_bound = bool(scheduler.waiting)


# Requests -------------------------------------------------------------------------------------------------


def keep_drafts(request: Request, count: int) -> None:
    """Let a request verify only the first ``count`` of its drafts in the next step.

    Under async scheduling the list is one that all requests share, so it is replaced, never changed.
    """
    if len(request.spec_token_ids) > count:
        request.spec_token_ids = request.spec_token_ids[:count]


def drop_placeholders(request: Request) -> None:
    """Forget draft placeholders of a request that sits a step out: the worker's drafts are of the step before.

    Real drafts (n-grams, without async scheduling) stay: they follow the same tokens later as well.
    """
    if request.spec_token_ids and request.spec_token_ids[0] == -1:
        request.spec_token_ids = []


def sampled_tokens(output: ModelRunnerOutput, request_id: str) -> int:
    """Tokens that a step brought for a request, drafts that were right included; 0 when it sampled nothing."""
    tokens = output.sampled_token_ids
    return len(tokens[output.req_id_to_index[request_id]]) if tokens else 0


def can_preempt(scheduler: Scheduler, request: Request) -> bool:
    """Whether preempting a running request gives its KV blocks back at once and loses nothing.

    vLLM loses a streaming-input session whose turn ends with output that was in flight when it was preempted.
    """
    if request.resumable and request.num_output_placeholders:
        return False
    check = getattr(scheduler, "_request_blocks_can_be_freed", None)
    if check is not None:
        return bool(check(request))
    return not getattr(scheduler, "defer_block_free", False)


def preempt(scheduler: Scheduler, request: Request, timestamp_s: float) -> None:
    """Take a running request's KV away; its generated tokens are kept and it waits again."""
    if "drop_stale_output" in inspect.signature(scheduler._preempt_request).parameters:
        drop = bool(getattr(scheduler, "requires_kv_delivery", False))
        scheduler._preempt_request(request, timestamp_s, drop_stale_output=drop)
    else:
        scheduler._preempt_request(request, timestamp_s)
    scheduler.running.remove(request)  # last: a preemption that fails leaves the request where it was


def finish_kind(request: Request) -> str:
    """``stop``, ``length``, ``abort``, ``error`` or ``repetition``: how a finished request ended."""
    reason = request.get_finished_reason()
    return "error" if reason is None else str(reason)


def prefill_threshold(scheduler: Scheduler) -> int:
    """Most prefill tokens of one request in a step; 0 for no limit. vLLM sets it aside for a request that is alone."""
    threshold = int(scheduler.scheduler_config.long_prefill_token_threshold)
    if threshold <= 0:
        return 0
    num_requests = sum(scheduler.get_request_counts())
    if num_requests <= 1:
        return 0
    if getattr(scheduler, "adaptive_long_prefill_threshold", False):
        threshold = max(threshold, int(scheduler.scheduler_config.max_num_batched_tokens) // num_requests)
    return threshold


def encoder_embeds(request: Request) -> int:
    """Encoder embeddings that a request's images, audio and video need in all."""
    return sum(int(request.get_num_encoder_embeds(index)) for index in range(len(request.mm_features)))


def stock_class(vllm_config: Any) -> type:
    """The scheduler that vLLM itself would use for a resolved configuration."""
    if getattr(vllm_config.model_config, "is_diffusion", False):
        from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler  # noqa: PLC0415

        found: type = DiffusionAsyncScheduler
    elif vllm_config.scheduler_config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: PLC0415

        found = AsyncScheduler
    else:
        from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415

        found = Scheduler
    return found


def cap_prefills(scheduler: Scheduler, most_tokens: int) -> int:
    """Let no request get more than ``most_tokens`` in a step, 0 for vLLM's own limit alone; returns that limit."""
    own = int(scheduler.scheduler_config.long_prefill_token_threshold)
    if most_tokens:
        scheduler.scheduler_config.long_prefill_token_threshold = min(own, most_tokens) if own else most_tokens
    return own


def wanted_tokens(request: Request) -> int:
    """Tokens that vLLM would give a running request if it had the budget."""
    return int(request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens)
