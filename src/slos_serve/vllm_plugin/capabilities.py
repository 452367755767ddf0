"""What the plug-in does with each feature of vLLM: steered, stock or refused.

``steered``: requests that use the feature are planned like any other, within the limits the feature brings.
``stock``: vLLM's own scheduler makes every step, exactly as without the plug-in, and the log says why.
``refused``: the server does not start, and one sentence names the flag to change.
The table is printed at start for the features that are on, and docs/vllm.md shows all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from slos_serve.core.errors import UnsupportedEngineError


class Support(StrEnum):
    """How a feature is treated."""

    STEERED = "steered"
    STOCK = "stock"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Capability:
    """One feature.

    Attributes:
        feature: what it is, in vLLM's words.
        flag: the option that turns it on.
        support: how it is treated.
        note: for ``steered``, what the plan knows of it; else what to change and why.
        is_on: whether a resolved ``VllmConfig`` has it on.
        proof: the test that shows it, for ``steered``.
    """

    feature: str
    flag: str
    support: Support
    note: str
    is_on: Callable[[Any], bool]
    proof: str = ""


def _features(name: str) -> str:
    return f"tests/vllm/test_features.py::{name}"


def _always(_: Any) -> bool:
    return True


def _model_is(kind: str) -> Callable[[Any], bool]:
    return lambda config: bool(getattr(config.model_config, kind, False))


def _kv_role(*roles: str) -> Callable[[Any], bool]:
    def has_role(config: Any) -> bool:
        transfer = config.kv_transfer_config
        return transfer is not None and str(getattr(transfer, "kv_role", "")) in roles

    return has_role


def _speculates_with(*methods: str) -> Callable[[Any], bool]:
    def speculates(config: Any) -> bool:
        speculative = config.speculative_config
        return speculative is not None and (not methods or str(speculative.method) in methods)

    return speculates


def _pipeline_without_async(config: Any) -> bool:
    return config.parallel_config.pipeline_parallel_size > 1 and not config.scheduler_config.async_scheduling


def _pipeline_with_async(config: Any) -> bool:
    return config.parallel_config.pipeline_parallel_size > 1 and bool(config.scheduler_config.async_scheduling)


def _is_hybrid(config: Any) -> bool:
    model = config.model_config
    return bool(getattr(model, "is_hybrid", False) or getattr(model, "is_attention_free", False))


STEERED, STOCK, REFUSED = Support.STEERED, Support.STOCK, Support.REFUSED
CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        "Text generation, chunked prefill, prefix cache, preemption, abort, pause",
        "",
        STEERED,
        "cached prefixes are looked up a bounded number of times a step; paused engines keep vLLM's own order",
        _always,
        "tests/vllm/test_scheduler_dry.py",
    ),
    Capability(
        "Async scheduling",
        "--async-scheduling",
        STEERED,
        "the plan is for the step after the one in flight",
        lambda config: bool(config.scheduler_config.async_scheduling),
        "tests/vllm/test_scheduler_dry.py",
    ),
    Capability(
        "Structured output (JSON mode, tool calls)",
        "",
        STEERED,
        "a request whose grammar is compiled is planned like any other from the next step on",
        _always,
        _features("test_structured_output_first_token"),
    ),
    Capability(
        "Streaming-input sessions",
        "",
        STEERED,
        "parked sessions keep their slot in the plan; each turn has a promise of its own",
        _always,
        _features("test_streaming_sessions"),
    ),
    Capability(
        "LoRA",
        "--enable-lora",
        STEERED,
        "held requests count, so that --max-loras holds in every step",
        lambda config: config.lora_config is not None,
        _features("test_lora_adapters_are_kept_within_max_loras"),
    ),
    Capability(
        "KV connector, consumer side (P/D decode, NIXL, LMCache)",
        "--kv-transfer-config",
        STEERED,
        "KV that a connector supplies counts as computed; loads begin as in stock order; their time is learnt, and "
        "room is kept for a promise meanwhile",
        _kv_role("kv_consumer", "kv_both"),
        _features("test_remote_kv_first_token"),
    ),
    Capability(
        "KV connector, producer side (P/D prefill)",
        "--kv-transfer-config",
        STEERED,
        "preemption as vLLM does it where KV is to be delivered; blocks still being sent are not free",
        _kv_role("kv_producer", "kv_both"),
        _features("test_kv_producer_keeps_blocks_until_sent"),
    ),
    Capability(
        "Encoder cache transfer (E/P/D)",
        "--ec-transfer-config",
        STOCK,
        "an encoder on another server is unknown to the plan; start without --ec-transfer-config to have promises kept",
        lambda config: getattr(config, "ec_transfer_config", None) is not None,
    ),
    Capability(
        "Multimodal input",
        "--limit-mm-per-prompt",
        STEERED,
        "vLLM's encoder budget holds; the encoder's time is learnt and taken off the time to first token",
        lambda config: bool(getattr(config.model_config, "supports_multimodal_inputs", False)),
        _features("test_encoder_budget"),
    ),
    Capability(
        "Speculative decoding: n-gram, draft model",
        "--speculative-config",
        STEERED,
        "draft lengths are planned; a start that vLLM pads to 1 + drafts is planned as such",
        _speculates_with("ngram", "ngram_gpu", "draft_model", "suffix"),
        "tests/vllm/test_scheduler_drafts.py",
    ),
    Capability(
        "Speculative decoding: EAGLE, MTP, Medusa and others",
        "--speculative-config",
        STEERED,
        "as above; the batch-time profile must have been measured with the same drafter",
        lambda config: (
            _speculates_with()(config) and not _speculates_with("ngram", "ngram_gpu", "draft_model", "suffix")(config)
        ),
        _features("test_padded_start"),
    ),
    Capability(
        "Tensor and expert parallel",
        "--tensor-parallel-size",
        STEERED,
        "one scheduler for all ranks",
        lambda config: config.parallel_config.tensor_parallel_size > 1,
        "tests/vllm/test_scheduler_dry.py",
    ),
    Capability(
        "Data parallel",
        "--data-parallel-size",
        STEERED,
        "each rank plans alone; steps in which vLLM defers prompts to balance the ranks are stock",
        lambda config: config.parallel_config.data_parallel_size > 1,
        _features("test_prefill_throttling"),
    ),
    Capability(
        "Pipeline parallel with async scheduling (model runner V2)",
        "--pipeline-parallel-size",
        STEERED,
        "a request is planned only in the steps in which its turn in the pipeline has come",
        _pipeline_with_async,
        _features("test_pipeline_cadence"),
    ),
    Capability(
        "Pipeline parallel without async scheduling",
        "--pipeline-parallel-size",
        STOCK,
        "steps overlap and their tokens come late; to have promises kept use one pipeline stage, or --async-scheduling "
        "with the V2 model runner",
        _pipeline_without_async,
    ),
    Capability(
        "Hybrid KV cache (sliding window, chunked attention)",
        "",
        STEERED,
        "each group of layers is counted with its own need of blocks",
        lambda config: (
            bool(getattr(config.model_config, "is_interleaved", False))
            or getattr(config.model_config.hf_text_config, "sliding_window", None) is not None
        ),
        _features("test_hybrid_groups"),
    ),
    Capability(
        "Mamba and linear attention",
        "--mamba-cache-mode",
        STEERED,
        "state blocks are counted once a request; chunks end at block boundaries where vLLM aligns them",
        _is_hybrid,
        _features("test_mamba_alignment"),
    ),
    Capability(
        "Limit of active requests",
        "--max-num-active-seqs",
        STEERED,
        "held requests count",
        lambda config: getattr(config.scheduler_config, "max_num_active_seqs", None) is not None,
        _features("test_max_num_active_seqs"),
    ),
    Capability(
        "Limit of long prefills",
        "--long-prefill-token-threshold",
        STEERED,
        "chunks are planned no longer than the limit; held requests count among those that share a step",
        lambda config: config.scheduler_config.long_prefill_token_threshold > 0,
        _features("test_long_prefill_token_threshold"),
    ),
    Capability(
        "Prefill without chunks",
        "--no-enable-chunked-prefill",
        STEERED,
        "prompts are planned whole",
        lambda config: not config.scheduler_config.enable_chunked_prefill,
        _features("test_unchunked_prefill"),
    ),
    Capability(
        "Model runner V1 and V2",
        "",
        STEERED,
        "both are asked for the same steps; held decodes were run on V1 only, V2 only in vLLM's scheduler",
        _always,
        "tests/vllm/test_greedy.py",
    ),
    Capability(
        "Priority scheduling",
        "--scheduling-policy priority",
        REFUSED,
        "--scheduling-policy: got 'priority'; allowed: 'fcfs'. SLOScheduler orders requests by their promises; give "
        "classes weights instead of priorities.",
        lambda config: str(config.scheduler_config.policy) != "fcfs",
    ),
    Capability(
        "Pooling, embedding, reward and classification models",
        "--runner pooling",
        STOCK,
        "such requests have no tokens to promise; leave out --scheduler-cls",
        lambda config: config.model_config.runner_type == "pooling",
    ),
    Capability(
        "Encoder-decoder models",
        "",
        STOCK,
        "cross-attention memory is unknown to the plan; leave out --scheduler-cls",
        _model_is("is_encoder_decoder"),
    ),
    Capability(
        "Diffusion language models",
        "",
        STOCK,
        "vLLM has a scheduler of its own for them, which is used; leave out --scheduler-cls",
        _model_is("is_diffusion"),
    ),
)


def active(config: Any) -> Iterator[Capability]:
    """Rows of features that a resolved ``VllmConfig`` has on; a row that cannot be told counts as off."""
    for row in CAPABILITIES:
        try:
            if row.is_on(config):
                yield row
        except AttributeError:
            continue


def reason_for_stock(config: Any) -> str | None:
    """Why every step is to be vLLM's own; ``None`` where steps can be planned.

    Raises:
        UnsupportedEngineError: the configuration is refused; the message names the flag to change.
    """
    rows = list(active(config))
    for row in rows:
        if row.support == Support.REFUSED:
            raise UnsupportedEngineError(row.note)
    for row in rows:
        if row.support == Support.STOCK:
            return f"{row.feature}: {row.note}"
    return None


def as_markdown() -> str:
    """The table of docs/vllm.md."""
    lines = ["| feature | option | treated as | what that means | shown by |", "|---|---|---|---|---|"]
    for row in CAPABILITIES:
        flag = f"`{row.flag}`" if row.flag else ""
        proof = f"`{row.proof}`" if row.proof else ""
        lines.append(f"| {row.feature} | {flag} | {row.support} | {row.note} | {proof} |")
    return "\n".join(lines)
