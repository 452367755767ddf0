"""Greedy outputs with the plug-in are those of stock vLLM, token for token, on the real engine in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

vllm = pytest.importorskip("vllm")

from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.settings import CLASSES_VARIABLE, EVENTS_VARIABLE, PROFILE_VARIABLE

pytestmark = pytest.mark.engine

# Promises loose enough that decodes get ahead of them and are held while prompts come in.
CLASSES = """
classes:
  near: {ttft_ms: 60000, tpot_ms: 1500}
  far: {ttft_ms: 120000, tpot_ms: 4000, max_stall_ms: 60000}
"""
# Roughly this engine on two cores; what is asserted does not hang on it.
ROUGH_MODEL = BatchTimeModel(2e-3, 0.05, 2e-3, 0.05, 0.0, 0.0, 3e-3)
TOPICS = ("rivers", "bread", "winter", "trains", "glass", "chess", "bees", "maps", "salt", "moons")


def prompts() -> list[str]:
    """50 prompts from a dozen to several hundred tokens."""
    return [f"Tell me about {TOPICS[n % 10]} and {TOPICS[n // 10]}. " * (1 + (n * 7) % 23) for n in range(50)]


def generate(model: str, slo: bool, **arguments: Any) -> list[tuple[int, ...]]:
    """Greedy answers of one engine; every third request carries no promise when ``slo`` is set."""
    engine = vllm.LLM(
        model,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=24,
        max_num_batched_tokens=256,
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=150,
        **arguments,
    )
    names = (None, "near", "far")
    sampling = [
        vllm.SamplingParams(
            temperature=0.0,
            max_tokens=24 + n % 17,
            ignore_eos=True,
            extra_args={"slo_class": names[n % 3]} if slo and names[n % 3] else None,
        )
        for n in range(50)
    ]
    answers = engine.generate(prompts(), sampling, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    return [tuple(answer.outputs[0].token_ids) for answer in answers]


def test_fifty_prompts_token_for_token(cpu_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    profile = Profile("m", "d", "vllm", compat.engine_version(), "now", "float32", 1, 4800, 32, 256, ROUGH_MODEL)
    save_profile(profile, tmp_path / "profile.json")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv(CLASSES_VARIABLE, str(tmp_path / "classes.yaml"))
    monkeypatch.setenv(PROFILE_VARIABLE, str(tmp_path / "profile.json"))
    monkeypatch.setenv(EVENTS_VARIABLE, str(tmp_path / "events.jsonl"))
    stock = generate(cpu_model, slo=False)
    ours = generate(cpu_model, slo=True, scheduler_cls="slos_serve.vllm_plugin.SLOScheduler")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    requests = [event for event in events if event["kind"] == "request"]
    assert sum(step["held"] for step in steps) > 0
    assert sum(request["num_preemptions"] for request in requests) > 0
    assert sum(step["preempted"] for step in steps) > 0
    assert any(request["prompt_tokens"] > 256 for request in requests)  # chunked: no step holds that many
    assert not [step["fallback"] for step in steps if step["fallback"]]
    different = [n for n in range(50) if stock[n] != ours[n]]
    assert not different
    assert np.mean([len(answer) for answer in ours]) > 24
