"""A scheduler of any class for a tiny model, built as vLLM's engine core builds it for the configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

VOCABULARY = 32_000
_TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16384,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
SLIDING_WINDOW = 128


@dataclass(frozen=True)
class Setup:
    """What the configuration of a dry scheduler holds beyond engine arguments.

    Attributes:
        kv_groups: layers by kind, of ``full``, ``sliding`` and ``mamba`` (cached in align mode).
        runner_v2: vLLM's model runner V2, which needs a GPU; only what the scheduler does for it is modelled.
        kv_role: role of a :class:`DryConnector`, empty for no connector.
        encoder_tokens: encoder budget of a step and size of the encoder cache, 0 for a model without images.
    """

    kv_groups: tuple[str, ...] = ("full",)
    runner_v2: bool = False
    kv_role: str = ""
    encoder_tokens: int = 0


def stock_class(*, async_scheduling: bool = True) -> type[Scheduler]:
    """The class that vLLM takes when ``--scheduler-cls`` is not given."""
    chosen: type[Scheduler] = AsyncScheduler if async_scheduling else Scheduler
    return chosen


def make_scheduler(
    scheduler_cls: type[Scheduler],
    folder: Path,
    *,
    num_blocks: int = 1000,
    block_size: int = 16,
    setup: Setup = Setup(),
    **engine_args: Any,
) -> Any:
    """A scheduler for a tiny model whose config is written to ``folder``.

    Async scheduling is on, as on a GPU, unless ``engine_args`` says otherwise; vLLM turns it off on a CPU, where no
    worker could follow, so it is set behind vLLM's back.
    """
    config = make_config(folder, num_blocks=num_blocks, block_size=block_size, setup=setup, **engine_args)
    with _images(setup, config):
        return scheduler_cls(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=_kv_groups(setup.kv_groups, block_size, config),
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            log_stats=False,
        )


def make_config(folder: Path, *, num_blocks: int, block_size: int, setup: Setup, **engine_args: Any) -> Any:
    """The resolved configuration of such a scheduler."""
    (folder / "config.json").write_text(json.dumps(_TINY_LLAMA), encoding="utf-8")
    settings = {
        "max_model_len": 8192,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
    } | engine_args
    async_scheduling = settings.pop("async_scheduling", True)
    if setup.kv_role:
        settings["kv_transfer_config"] = _connector_config(setup.kv_role)
    if "mamba" in setup.kv_groups:
        settings["mamba_cache_mode"] = "align"
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        block_size=block_size,
        **settings,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks
    config.scheduler_config.async_scheduling = async_scheduling
    if setup.runner_v2:
        object.__setattr__(config, "__class__", _RunnerV2Config)
    return config


class _RunnerV2Config(VllmConfig):  # type: ignore[misc, unused-ignore]
    """The configuration on a machine with Triton."""

    use_v2_model_runner = property(lambda _: True)


def _connector_config(kv_role: str) -> Any:
    from vllm.config import KVTransferConfig  # noqa: PLC0415 - slow, and few schedulers have a connector

    from slos_serve.testing.connector import NAME, register  # noqa: PLC0415

    register()
    return KVTransferConfig(kv_connector=NAME, kv_role=kv_role, kv_load_failure_policy="recompute")


def _images(setup: Setup, config: Any) -> AbstractContextManager[Any]:
    """Let the scheduler take the model for one with images, whose processor need not be loaded."""
    if not setup.encoder_tokens:
        return nullcontext()
    object.__setattr__(config.model_config, "_supports_multimodal_inputs_cache", _AlwaysTrue())
    budget = mock.Mock(
        encoder_compute_budget=setup.encoder_tokens,
        encoder_cache_size=setup.encoder_tokens,
        mm_max_toks_per_item={"image": setup.encoder_tokens},
    )
    return mock.patch("vllm.v1.core.sched.scheduler.MultiModalBudget", return_value=budget)


class _AlwaysTrue(dict[Any, bool]):
    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: object) -> bool:
        return True


def _kv_groups(kinds: Sequence[str], block_size: int, config: Any) -> list[Any]:
    return [
        KVCacheGroupSpec([f"{kind}-{index}"], _spec_of(kind, block_size, config)) for index, kind in enumerate(kinds)
    ]


def _spec_of(kind: str, block_size: int, config: Any) -> Any:
    attention = {"block_size": block_size, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    if kind == "full":
        return FullAttentionSpec(**attention)
    from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec  # noqa: PLC0415 - few schedulers have them

    if kind == "sliding":
        return SlidingWindowSpec(**attention, sliding_window=SLIDING_WINDOW)
    return MambaSpec(
        block_size=block_size,
        shapes=((2, 512),),
        dtypes=(torch.float32,),
        mamba_cache_mode="align",
        num_speculative_blocks=config.num_speculative_tokens,
    )
