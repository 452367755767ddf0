"""A profile for tests of the small model on a real engine, where what is checked does not hang on its numbers."""

from __future__ import annotations

from pathlib import Path

import vllm

from slos_serve.files.engine_identity import model_label
from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.launch.cpu_engine import cpu_engine_args
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.vllm_plugin.identity import device_name

# Roughly this engine on two cores.
ROUGH_MODEL = BatchTimeModel(k_c_s=0.002, b_c_s=0.02, k_m_s=0.0005, b_m_s=0.04, k_seq_s=0.005)


def save_rough_profile(model: str, folder: Path) -> Path:
    """``profile.json`` in ``folder``, of ``model`` on this machine."""
    profile = Profile(
        model_name=model_label(model),
        device=device_name(),
        engine="vllm",
        engine_version=vllm.__version__,
        created="2026-01-01T00:00:00+00:00",
        dtype=cpu_engine_args()[1],
        tensor_parallel=1,
        kv_capacity_tokens=40_000,
        block_size=128,
        max_num_batched_tokens=2048,
        model=ROUGH_MODEL,
    )
    save_profile(profile, folder / "profile.json")
    return folder / "profile.json"
