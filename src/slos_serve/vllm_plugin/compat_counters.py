"""vLLM's counters of many requests at once: what is read of every running request in every step.

No Python call is made for a single request: with 256 of them that would take most of the plug-in's time. The names are
checked at start with those of :mod:`slos_serve.vllm_plugin.compat`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

IntArray = NDArray[np.int64]
_COMPUTED, _PLACEHOLDERS = operator.attrgetter("num_computed_tokens"), operator.attrgetter("num_output_placeholders")
_OUTPUTS, _DRAFTS = operator.attrgetter("_output_token_ids"), operator.attrgetter("spec_token_ids")
_PROMPT, _MOST = operator.attrgetter("num_prompt_tokens"), operator.attrgetter("max_tokens")
_TURN = operator.attrgetter("next_decode_eligible_step")


def advances_alone(scheduler: Scheduler) -> bool:
    """Whether computed tokens tell all progress of a running request: see :mod:`slos_serve.vllm_plugin.progress`."""
    return (
        isinstance(scheduler, AsyncScheduler)
        and not scheduler.num_spec_tokens
        and scheduler.connector is None
        and scheduler.vllm_config.parallel_config.pipeline_parallel_size == 1
        and getattr(scheduler, "num_sampled_tokens_per_step", 1) == 1
    )


def counters(requests: Sequence[Request]) -> tuple[IntArray, IntArray, IntArray]:
    """Computed tokens, output tokens and output tokens in flight of requests; int64 [n] each."""
    return computed_tokens(requests), output_tokens(requests), _numbers(_PLACEHOLDERS, requests)


def computed_tokens(requests: Sequence[Request]) -> IntArray:
    """Tokens with KV of requests, those of steps in flight counted; int64 [n]."""
    return _numbers(_COMPUTED, requests)


def output_tokens(requests: Sequence[Request]) -> IntArray:
    """Output tokens that have come of requests; int64 [n]. Past vLLM's property, which is a Python call for each."""
    return np.fromiter(map(len, map(_OUTPUTS, requests)), np.int64, len(requests))


def ends_of(requests: Sequence[Request]) -> IntArray:
    """Tokens that each request has when it ends at the latest; int64 [n]."""
    return _numbers(_PROMPT, requests) + _numbers(_MOST, requests)


def last_in_flight(requests: Sequence[Request], computed: IntArray, ends: IntArray) -> NDArray[np.bool_]:
    """Which requests wait for nothing but a last token that is in flight, as vLLM tells it; bool [n]."""
    in_flight = _numbers(_PLACEHOLDERS, requests)
    found: NDArray[np.bool_] = (in_flight > 0) & (computed + 2 - in_flight >= ends)
    return found


def _numbers(get: Callable[[Any], Any], requests: Sequence[Request]) -> IntArray:
    return np.fromiter(map(get, requests), np.int64, len(requests))


def cannot_run_now(
    scheduler: Scheduler,
    requests: Sequence[Request],
    counted: tuple[IntArray, IntArray, IntArray],
    ends: IntArray,
) -> NDArray[np.bool_]:
    """Which running requests vLLM's next ``schedule()`` would pass over; bool [n].

    A request whose last token is in flight, and one whose turn in the pipeline's cadence has not come.

    Args:
        scheduler: vLLM's.
        requests: running ones.
        counted: their :func:`counters`.
        ends: their :func:`ends_of`.
    """
    computed, outputs, in_flight = counted
    tokens = _numbers(_PROMPT, requests) + outputs + in_flight
    if scheduler.num_spec_tokens:
        tokens += np.fromiter(map(len, map(_DRAFTS, requests)), np.int64, len(requests))
    cannot: NDArray[np.bool_] = tokens <= computed
    cannot |= last_in_flight(requests, computed, ends)
    if scheduler.vllm_config.parallel_config.pipeline_parallel_size > 1:
        cannot |= _numbers(_TURN, requests) > scheduler.current_step + 1
    return cannot
