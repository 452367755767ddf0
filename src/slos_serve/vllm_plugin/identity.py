"""What the engine is, for telling whether a batch-time profile was measured on the same."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path
from typing import Any

import vllm
from vllm.platforms import current_platform

from slos_serve.files.engine_identity import NONE, EngineIdentity, describe, model_label
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.metrics import EngineLabels

__all__ = ["EngineIdentity", "check_profile", "device_name", "engine_labels", "identity_of"]
_logger = logging.getLogger("vllm.slos_serve")


def identity_of(vllm_config: Any) -> EngineIdentity:
    """Identity of an engine from its resolved vLLM configuration; the same in the server and in the engine core.

    A field that this version of vLLM does not have is unknown.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    scheduling, cache = vllm_config.scheduler_config, vllm_config.cache_config
    dtype = str(model.dtype).removeprefix("torch.")
    kv_dtype = str(cache.cache_dtype).removeprefix("torch.")
    runner = getattr(vllm_config, "use_v2_model_runner", None)
    is_async = getattr(scheduling, "async_scheduling", None)
    return EngineIdentity(
        model=model_label(str(model.model)),
        device=device_name(),
        engine_version=vllm.__version__,
        dtype=dtype,
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        data_parallel=parallel.data_parallel_size,
        expert_parallel=bool(getattr(parallel, "enable_expert_parallel", False)),
        quantization=str(model.quantization or NONE),
        kv_cache_dtype=dtype if kv_dtype == "auto" else kv_dtype,
        eager=bool(model.enforce_eager),
        model_runner=None if runner is None else ("V2" if runner else "V1"),
        speculation=_speculation(vllm_config.speculative_config),
        max_num_batched_tokens=scheduling.max_num_batched_tokens,
        max_num_seqs=scheduling.max_num_seqs,
        async_scheduling=None if is_async is None else bool(is_async),
    )


def engine_labels(vllm_config: Any) -> EngineLabels:
    """The labels of an engine's metrics, as vLLM's own series have them."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    served = getattr(model, "served_model_name", None)
    index = getattr(parallel, "data_parallel_index", getattr(parallel, "data_parallel_rank", 0))
    return EngineLabels(str(served or model.model), str(index))


def check_profile(config: PluginConfig, vllm_config: Any) -> bool:
    """Compare the profile with the engine; log every difference that it is used in spite of.

    Returns:
        Whether it was measured on something else, and is used because the configuration says so.

    Raises:
        ProfileMismatchError: it was measured on something else, and the configuration does not allow that.
    """
    if config.profile is None:
        return False
    found = config.profile.check_matches(identity_of(vllm_config), allow_mismatch=config.allow_profile_mismatch)
    if found:
        _logger.warning("slos-serve: %s", describe(found))
    return any(one.far for one in found)


def device_name() -> str:
    """The accelerator's name, or the CPU's with the cores this process may use."""
    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    return f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores"


def _speculation(speculative_config: Any) -> str:
    if speculative_config is None:
        return NONE
    return f"{speculative_config.method}, {speculative_config.num_speculative_tokens} drafts"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
