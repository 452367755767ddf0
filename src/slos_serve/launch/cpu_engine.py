"""How vLLM is set up for a small model on a few cores: one table, as arguments, keyword arguments and variables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from slos_serve.launch.options import option_values, option_words

_CPU_FACTS = Path("/proc/cpuinfo")
CPU_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


def cpu_engine_kwargs(facts: Path = _CPU_FACTS) -> dict[str, str | int | bool]:
    """Keyword arguments of vLLM's engine. Eager, so that no compilation delays the start.

    A core without bfloat16 instructions computes in float32 several times faster than it emulates bfloat16.
    """
    flags = facts.read_text(encoding="utf-8").split() if facts.exists() else []
    dtype = "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"
    return {"dtype": dtype, "max_model_len": 4096, "max_num_seqs": 64, "enforce_eager": True}


def cpu_engine_args(facts: Path = _CPU_FACTS) -> tuple[str, ...]:
    """:func:`cpu_engine_kwargs` as arguments of vLLM's server."""
    return cpu_model_args((), facts)


def cpu_model_args(given: Sequence[str], facts: Path = _CPU_FACTS) -> tuple[str, ...]:
    """``given``, before it those of :func:`cpu_engine_kwargs` that are not given."""
    words: list[str] = []
    for name, value in cpu_engine_kwargs(facts).items():
        option = option_words(name, value)
        if option_values(given, option[0]) is None:
            words += option
    return (*words, *given)


def set_cpu_environment() -> None:
    """Set what is not set of :data:`CPU_ENVIRONMENT`; vLLM reads some of it as it is imported."""
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
