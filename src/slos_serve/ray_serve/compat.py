"""Every name of Ray Serve LLM that is not public and that this package uses.

``ray.serve.llm`` publishes classes to be extended, not the functions that its ingress is made of. They are imported
here and nowhere else, so that a release which is too old or moves one fails at start with one message.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from vllm.platforms import current_platform

from slos_serve.core.errors import UnsupportedEngineError

OLDEST = (2, 60)
# Part of what vLLM answers when its engine is dead, in an error of a stream that has begun.
ENGINE_DEAD = ("EngineDead", "EngineCore")


def check_version(found: str) -> None:
    """Refuse a Ray that is older than what this package was made for, whose names may be there and mean less.

    Raises:
        UnsupportedEngineError: says which release is needed.
    """
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if len(numbers) == len(OLDEST) and numbers < OLDEST:
        raise UnsupportedEngineError(_needs(f"pip install 'ray[serve]>={OLDEST[0]}.{OLDEST[1]}'"))


def _needs(what: str) -> str:
    return (
        f"slos-serve serves replicas with Ray Serve LLM {OLDEST[0]}.{OLDEST[1]} or later; this is Ray "
        f"{ray.__version__}: {what}"
    )


check_version(ray.__version__)
try:
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
    from ray.llm._internal.common.callbacks.base import CallbackBase
    from ray.llm._internal.serve.constants import DEFAULT_LLM_ROUTER_HTTP_TIMEOUT as HTTP_TIMEOUT_S
    from ray.llm._internal.serve.core.configs.openai_api_models import (
        ChatCompletionRequest,
        ErrorResponse,
        OpenAIHTTPException,
        to_model_metadata,
    )
    from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, router_request_timeout
    from ray.llm._internal.serve.core.ingress.ingress import init as fastapi_app
    from ray.llm._internal.serve.core.ingress.utils import (
        NON_STREAMING_RESPONSE_TYPES,
        _apply_openai_json_format,
        _sanitize_chat_completion_request,
    )
    from ray.llm._internal.serve.core.protocol import RawRequestInfo
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from ray.serve.context import _get_global_client
    from ray.serve.handle import DeploymentBroadcastResponse
except ImportError as fault:
    raise UnsupportedEngineError(_needs(f"it lacks what is needed: {fault}")) from fault

if not hasattr(DeploymentBroadcastResponse, "_fetch_replica_results_async"):
    raise UnsupportedEngineError(_needs("its broadcasts have no answers of single replicas"))

__all__ = [
    "DEFAULT_ENDPOINTS",
    "HTTP_TIMEOUT_S",
    "NON_STREAMING_RESPONSE_TYPES",
    "CallbackBase",
    "ChatCompletionRequest",
    "ClusterStore",
    "ErrorResponse",
    "OpenAIHTTPException",
    "RawRequestInfo",
    "VLLMEngine",
    "answers_of",
    "endpoint_options",
    "engine_is_on_cpu",
    "fastapi_app",
    "router_request_timeout",
    "sent_form",
    "server_sent",
    "to_model_metadata",
]


class ClusterStore:
    """Ray's key-value store of the cluster that this process belongs to."""

    def get(self, key: bytes) -> bytes | None:
        """The value, ``None`` without one."""
        found: bytes | None = _internal_kv_get(key)
        return found

    def put_new(self, key: bytes, value: bytes) -> None:
        """Store a value where there is none yet."""
        _internal_kv_put(key, value, overwrite=False)


async def answers_of(response: Any, timeout_s: float) -> tuple[list[Any], int]:
    """What replicas answered a broadcast in time, and how many did not; Ray gives all answers or none.

    Args:
        response: of a handle's ``broadcast``.
        timeout_s: for each replica, all at once.

    Raises:
        Exception: whatever Ray raises when there is no replica to ask.
    """
    asked = await asyncio.wait_for(response._fetch_replica_results_async(), timeout_s)
    tasks = [asyncio.ensure_future(each.get_async()) for each in asked]
    if not tasks:
        return [], 0
    done, late = await asyncio.wait(tasks, timeout=timeout_s)
    for task in late:
        task.cancel()
    answers = [task.result() for task in tasks if task in done and not task.cancelled() and task.exception() is None]
    return answers, len(tasks) - len(answers)


def endpoint_options() -> Any:
    """HTTP options of the Ray Serve instance that runs now."""
    client = _get_global_client()
    return None if client is None else client.http_config


def sent_form(body: Any) -> Any:
    """The request in a form that can be pickled."""
    return _sanitize_chat_completion_request(body) if isinstance(body, ChatCompletionRequest) else body


def server_sent(chunk: Any) -> str:
    """A chunk of an answer, or a batch of them, as server-sent events."""
    return str(_apply_openai_json_format(chunk))


def engine_is_on_cpu() -> bool:
    """Whether the vLLM installed here computes on the CPU."""
    return bool(current_platform.is_cpu())
