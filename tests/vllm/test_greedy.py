"""Greedy outputs with the plug-in are those of stock vLLM, token for token, on the real engine in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slos_serve.files.engine_identity import model_label
from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.perf.batch_time import BatchTimeModel

pytestmark = pytest.mark.engine

PROJECT = Path(__file__).resolve().parents[2]
# Promises that any machine keeps. Held decodes are compared in test_scheduler_dry.py.
CLASSES = """
classes:
  near: {ttft_ms: 60000, tpot_ms: 1500}
  far: {ttft_ms: 120000, tpot_ms: 4000, max_stall_ms: 60000}
"""
# Roughly this engine on two cores; what is asserted does not hang on it.
ROUGH_MODEL = BatchTimeModel(2e-3, 0.05, 2e-3, 0.05, 0.0, 0.0, 3e-3)


def generate(model: str, folder: Path, side: str) -> list[list[int]]:
    """Greedy answers of one engine."""
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "SLOS_SERVE_CLASSES": str(folder / "classes.yaml"),
        "SLOS_SERVE_PROFILE": str(folder / "profile.json"),
        "SLOS_SERVE_EVENTS": str(folder / "events.jsonl"),
    }
    if side == "stock":
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the same engine, started half a minute sooner
    out = folder / f"{side}.json"
    command = [sys.executable, "-m", "tests.vllm.greedy_run", model, str(out), side]
    done = subprocess.run(
        command,
        check=False,
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert out.exists(), done.stderr[-4000:]
    answers: list[list[int]] = json.loads(out.read_text(encoding="utf-8"))
    return answers


@pytest.fixture(scope="module")
def stock(cpu_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Answers of stock vLLM without speculation."""
    return generate(cpu_model, tmp_path_factory.mktemp("stock"), "stock")


LONG = [pytest.param(side, marks=pytest.mark.long) for side in ("drafts", "draft-model")]


@pytest.mark.parametrize("side", ["ours", *LONG])
def test_fifty_prompts_token_for_token(cpu_model: str, tmp_path: Path, stock: list[list[int]], side: str) -> None:
    identity = pytest.importorskip("slos_serve.vllm_plugin.identity")
    compat = pytest.importorskip("slos_serve.vllm_plugin.compat")
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    label, device, version = (
        model_label(cpu_model),
        identity.device_name(),
        compat.engine_version(),
    )
    profile = Profile(label, device, "vllm", version, "now", "float32", 1, 4800, 32, 256, ROUGH_MODEL)
    save_profile(profile, tmp_path / "profile.json")
    ours = generate(cpu_model, tmp_path, side)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    requests = [event for event in events if event["kind"] == "request"]
    assert len(requests) == 50
    # A model that drafts for itself is always right: answers end before KV blocks are short.
    assert side == "draft-model" or sum(step["preempted"] for step in steps) > 0
    assert any(request["prompt_tokens"] > 256 for request in requests)  # chunked: no step holds that many
    # A machine that is busy may make a plan late, and the steps after it rest; a fault is none of that.
    assert {step["fallback"] for step in steps} <= {None, "empty_plan", "resting"}
    assert [n for n in range(50) if stock[n] != ours[n]] == []
    assert all(len(answer) == 24 + n % 17 for n, answer in enumerate(ours))
