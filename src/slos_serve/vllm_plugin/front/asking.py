"""What a request asks for, as routers put it: from its class, its fields and what vLLM knows of it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from slos_serve.core.request import share_of
from slos_serve.core.slo import SLOClass, WhenFull
from slos_serve.core.trust import Trust
from slos_serve.routing.router import RoutingRequest
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.seal import Seal, seal_of
from slos_serve.vllm_plugin.slo_args import SloArgs

MAX_FRONT_END_S = 60.0


class Asking:
    """Makes a :class:`RoutingRequest` of a request.

    Args:
        config: margins and profile.
        max_model_len: longest context of the model.
        indices: of the classes that the server started with, by name.
        trust: of the class file that requests are judged by.
    """

    def __init__(
        self, config: PluginConfig, max_model_len: int, indices: Mapping[str, int], trust: Callable[[], Trust]
    ) -> None:
        self._config = config
        self._max_model_len = max_model_len
        self._indices = indices
        self._trust = trust
        self._seal: Seal | None = None

    def of(
        self, slo_class: SLOClass | None, args: SloArgs, prompt: object, tokens: int, params: Any, now_s: float
    ) -> RoutingRequest:
        """What it asks for.

        Args:
            slo_class: with the promise that is meant; ``None`` without one.
            args: its fields.
            prompt: as vLLM hands it to the engine; the stamp of its arrival is used if it has one.
            tokens: of the prompt.
            params: vLLM's sampling parameters.
            now_s: present time.
        """
        assert self._config.profile is not None
        if slo_class is not None and slo_class.best_effort:
            slo_class = None
        stamp = prompt.get("arrival_time") if isinstance(prompt, dict) else None
        waited_s = min(max(time.time() - stamp, 0.0), MAX_FRONT_END_S) if isinstance(stamp, float) else 0.0
        arrival_s, room = now_s - waited_s, max(self._max_model_len - tokens, 1)
        alone_s = self._config.profile.model.zero_load_s(tokens)
        ttft_s = math.inf if slo_class is None else slo_class.slo.ttft_s(alone_s)
        index, margin_s = len(self._indices) + 1, self._config.planner.ttft_margin_s
        if slo_class is not None:
            index = self._indices.get(slo_class.name, len(self._indices))
        return RoutingRequest(
            arrival_s=arrival_s,
            prompt_tokens=tokens,
            max_tokens=max(min(getattr(params, "max_tokens", None) or room, room), 1),
            ttft_due_s=arrival_s + ttft_s - margin_s,
            tpot_s=math.inf if slo_class is None else slo_class.slo.tpot_s,
            answer_due_s=math.inf if slo_class is None else arrival_s + slo_class.slo.e2e_s - margin_s,
            class_index=index,
            share=self._share(index, args),
            weight=1.0 if slo_class is None else max(slo_class.weight, 1e-6),
            hint_tokens=args.expected_tokens or 0,
            reject_when_full=slo_class is not None and slo_class.when_full is not WhenFull.BEST_EFFORT,
        )

    def _share(self, class_index: int, args: SloArgs) -> int:
        trust = self._trust()
        if self._seal is None and trust.knows_tenants:
            self._seal = seal_of(os.environ)
        tenant = None if self._seal is None else self._seal.opened(args.tenant)
        return share_of(class_index, len(self._indices) + 2, trust.place(tenant))
