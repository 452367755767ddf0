"""What an engine is, for telling whether a batch-time profile was measured on the same."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm
from vllm.platforms import current_platform


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What a profile of this engine must have been measured on; the keys of ``find_profile``."""

    device: str
    engine_version: str
    dtype: str
    tensor_parallel: int


def identity_of(vllm_config: Any) -> EngineIdentity:
    """Identity of an engine from its resolved vLLM configuration; the same in the server and in the engine core."""
    return EngineIdentity(
        device=device_name(),
        engine_version=vllm.__version__,
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
    )


def device_name() -> str:
    """The accelerator's name, or the CPU's with the cores this process may use."""
    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    return f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
