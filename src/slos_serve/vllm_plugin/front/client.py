"""The place in vLLM's API process where a request is known whole: the call that hands it to the engine.

By then the prompt is tokens and the sampling parameters are final, and the answer's head has not been sent. The call is
wrapped on the engine client of this server; a context variable says which HTTP request makes it. A fault of ours costs
an answer its verdict, never the request.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from slos_serve.core.errors import SlosServeError
from slos_serve.vllm_plugin.class_versions import VERSION_KEY, ClassVersion
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.judged import HandedOver, Judged
from slos_serve.vllm_plugin.front.tracing import open_spans
from slos_serve.vllm_plugin.metrics import EngineLabels
from slos_serve.vllm_plugin.slo_args import TICKET_KEY, TOLD_KEY

_logger = logging.getLogger("vllm.slos_serve")
CURRENT: ContextVar[Judged | None] = ContextVar("slos_serve_judged", default=None)


def open_front(app: Any, environment: Mapping[str, str] = os.environ) -> FrontDesk | None:
    """Judge the requests of a server from now on; ``None`` where they cannot be.

    Args:
        app: vLLM's application; its state has the engine client.
        environment: the plug-in's variables.
    """
    client = getattr(getattr(app, "state", None), "engine_client", None)
    vllm_config = getattr(client, "vllm_config", None)
    if vllm_config is None or vllm_config.parallel_config.data_parallel_size > 1:
        return None
    try:
        config = PluginConfig.from_environment(environment)
        if not config.front_end or config.profile is None:
            return None
        model = vllm_config.model_config
        labels = EngineLabels(str(model.served_model_name or model.model))
        front = FrontDesk(config, labels, int(model.max_model_len))
        # While a connector is asked for a prompt's KV, vLLM's own order may begin it, which promises nothing.
        front.tells_at_once = vllm_config.kv_transfer_config is not None
        front.spans = open_spans(vllm_config)
        attach(client, front)
        front.start()
    except Exception:
        _logger.exception("slos-serve: answers have no verdict.")
        return None
    return front


def attach(client: Any, front: FrontDesk) -> None:
    """Have ``front`` judge each request that ``client`` hands to its engine."""
    hand_over = client.generate
    failed: list[str] = []

    @functools.wraps(hand_over)
    def generate(prompt: object, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        judged, handed = CURRENT.get(), None
        if judged is not None:
            try:
                handed = front.entered(judged, prompt, sampling_params, request_id)
            except Exception:
                if not failed:
                    failed.append(request_id)
                    _logger.exception("slos-serve: failed to judge a request (said once); it is served all the same.")
            if judged.refusal is not None:
                raise RefusedError("no room for this request's promise")
        params = with_said(sampling_params, front.version if judged is None else judged.version, handed)
        return hand_over(prompt, params, request_id, *args, **kwargs)

    client.generate = generate


def with_said(params: Any, version: ClassVersion, handed: HandedOver | None) -> Any:
    """The parameters with what the engine core is to know of the request; copied, for several prompts may share them.

    Args:
        params: vLLM's; a client's own values of our keys are dropped.
        version: of the class file that the request is judged by.
        handed: its ticket and what its client was told; ``None`` where it is not judged.
    """
    given = dict(getattr(params, "extra_args", None) or {})
    said: dict[str, object] = {VERSION_KEY: version.digest} if version.digest else {}
    if handed is not None:
        said[TICKET_KEY] = handed.ticket
    if handed is not None and handed.told is not None:
        said[TOLD_KEY] = handed.told
    kept = {key: value for key, value in given.items() if key not in (VERSION_KEY, TICKET_KEY, TOLD_KEY)}
    if kept | said == given:
        return params
    params = copy.copy(params)
    params.extra_args = kept | said
    return params


class RefusedError(SlosServeError, ValueError):
    """The request is refused before its engine sees it; the middleware answers in the place of vLLM's own handler."""
