"""Requests as vLLM's front end builds them, with the features that a scheduler has to know."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from slos_serve.testing.device import token_at

# Arrivals are stamped ahead of the wall clock, so that none has waited in a front end: the engine's time is virtual.
_AHEAD_S = 3600.0


class DryTokenizer:
    """Text of tokens, for what looks for stop strings in answers."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' numbers in angle brackets."""
        return "".join(f"<{token}>" for token in token_ids)


@dataclass(frozen=True)
class KVLoad:
    """KV that a connector has for a request's prompt.

    Attributes:
        tokens: prompt tokens that are stored outside.
        is_async: loaded between steps, as from a remote prefill server; otherwise within the step that starts it.
        steps: engine steps that an async load takes.
        unsure_asks: times the connector first answers that it does not know yet.
        fails: an async load that arrives broken.
    """

    tokens: int
    is_async: bool = True
    steps: int = 3
    unsure_asks: int = 0
    fails: bool = False


@dataclass(frozen=True)
class RequestFeatures:
    """What a request brings beyond its prompt.

    Attributes:
        grammar_steps: engine steps until its grammar is compiled, 0 for a compiled one, ``None`` without a grammar.
        adapter: LoRA adapter's number, 0 for none.
        load: KV that a connector has for it.
        send_steps: engine steps that a producer needs its KV for after it finished.
        images: ``(offset, length)`` of the placeholders of its images.
        resumable: a streaming-input session, whose next turn comes by :meth:`DryEngine.add_turn`.
        stop_after: the front end finds a stop string after this many tokens and cuts the answer there.
    """

    grammar_steps: int | None = None
    adapter: int = 0
    load: KVLoad | None = None
    send_steps: int = 0
    images: tuple[tuple[int, int], ...] = ()
    resumable: bool = False
    stop_after: int | None = None


PLAIN = RequestFeatures()


def make_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    slo: Mapping[str, Any] | None,
    features: RequestFeatures,
    block_hasher: Callable[[Request], Any],
) -> Request:
    """A request as the engine core receives it; ``slo`` goes where ``vllm_xargs`` goes."""
    extra: dict[str, Any] = dict(slo) if slo else {}
    transfer = _transfer_params(features)
    if transfer:
        extra["kv_transfer_params"] = transfer
    sampling = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        extra_args=extra or None,
        stop=_stop_strings(prompt, features),
        structured_outputs=_grammar_params(features),
    )
    arguments: dict[str, Any] = {}
    if features.adapter:
        from vllm.lora.request import LoRARequest  # noqa: PLC0415 - slow, and few requests have an adapter

        arguments["lora_request"] = LoRARequest(f"adapter-{features.adapter}", features.adapter, "/nonexistent")
    if features.images:
        arguments["mm_features"] = [_image(request_id, *place) for place in features.images]
    if features.resumable:
        arguments["resumable"] = True
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=sampling,
        pooling_params=None,
        arrival_time=time.time() + _AHEAD_S,
        block_hasher=block_hasher,
        **arguments,
    )


def _stop_strings(prompt: Sequence[int], features: RequestFeatures) -> list[str] | None:
    if features.stop_after is None:
        return None
    return [DryTokenizer().decode([token_at(prompt, features.stop_after - 1)])]


def _grammar_params(features: RequestFeatures) -> Any:
    if features.grammar_steps is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams  # noqa: PLC0415 - named otherwise in old versions

    return StructuredOutputsParams(json='{"type": "object"}')


def _transfer_params(features: RequestFeatures) -> dict[str, Any]:
    """Fields of the request that :class:`DryConnector` reads."""
    params: dict[str, Any] = {}
    if features.load is not None:
        load = features.load
        params["load"] = [load.tokens, load.is_async, load.steps, load.unsure_asks, load.fails]
    if features.send_steps:
        params["send_steps"] = features.send_steps
    return params


def _image(request_id: str, offset: int, length: int) -> Any:
    from vllm.multimodal.inputs import (  # noqa: PLC0415 - slow, and few requests have images
        MultiModalFeatureSpec,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem.dummy(),
        mm_position=PlaceholderRange(offset=offset, length=length),
        identifier=f"{request_id}-{offset}",
        modality="image",
    )
