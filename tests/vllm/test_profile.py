"""``slos-serve profile`` on the real engine for a few seconds: shapes are covered, samples make sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slos_serve.files.profile_file import (
    Profile,
    load_profile,
    load_samples,
    samples_path,
)
from slos_serve.launch.cpu_engine import cpu_engine_args
from slos_serve.perf.fit import Sample, predict_s

ARGS = (
    "--dtype",
    cpu_engine_args()[1],
    "--max-num-batched-tokens",
    "512",
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "32",
    "--enforce-eager",
)
# Enough for a slow and busy machine; measuring goes on to three times this when too few batches ran.
DURATION_S = 20.0


@dataclass(frozen=True)
class Run:
    """What the command left."""

    profile: Profile
    samples: list[Sample]
    report: dict[str, Any]
    output: str
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("profile")
    path = folder / "p.json"
    command = [
        str(Path(sys.executable).with_name("slos-serve")),
        "profile",
        "smollm2",
        *ARGS,
    ]
    command += [
        "--duration",
        str(DURATION_S),
        "--seed",
        "3",
        "--output",
        str(path),
        "--json",
        str(folder / "r.json"),
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((folder / "r.json").read_text())
    return Run(
        load_profile(path),
        load_samples(samples_path(path)),
        report,
        done.stdout,
        folder,
    )


@pytest.mark.engine
def test_shapes_cover_decodes_prefill_and_mixtures(run: Run) -> None:
    samples = run.samples
    decode_only = [s for s in samples if s.prefill_tokens == 0]
    prefill_only = [s for s in samples if s.prefill_tokens == s.shape.new_tokens]
    mixed = [s for s in samples if 0 < s.prefill_tokens < s.shape.new_tokens]
    assert min(map(len, (decode_only, prefill_only, mixed))) >= 3, len(samples)
    assert max(s.shape.new_tokens for s in decode_only) >= 4 * min(s.shape.new_tokens for s in decode_only)
    assert max(s.prefill_tokens for s in samples) >= 8 * min(s.prefill_tokens for s in samples if s.prefill_tokens)


@pytest.mark.engine
def test_samples_are_consistent(run: Run) -> None:
    limit = run.profile.max_num_batched_tokens
    for sample in run.samples:
        shape = sample.shape
        assert 1 <= shape.num_seqs <= shape.new_tokens <= limit
        assert 0 <= sample.prefill_tokens <= shape.new_tokens
        # Each chunk counts at least its own square; with one chunk of c tokens that is c^2.
        assert shape.quad_tokens2 >= sample.prefill_tokens
        if sample.prefill_tokens == 0:
            assert shape.quad_tokens2 == 0
            assert shape.num_seqs == shape.new_tokens
            assert shape.context_tokens >= shape.num_seqs
    # Steps follow one another: together they cannot have taken longer than the whole measurement.
    assert sum(sample.duration_s for sample in run.samples) <= 3.0 * DURATION_S + 15.0


@pytest.mark.engine
def test_the_profile_says_what_it_was_measured_on(run: Run) -> None:
    profile = run.profile
    assert profile.engine == "vllm"
    assert profile.dtype == cpu_engine_args()[1]
    assert profile.model_name.startswith("smollm2")
    assert profile.kv_capacity_tokens > 10_000
    assert profile.kv_capacity_tokens % profile.block_size == 0
    assert run.report["max_num_seqs"] == 32
    # vLLM turns asynchronous scheduling off on CPUs; the profile must say what was so.
    assert run.report["async_scheduling"] is False
    assert "async scheduling off" in profile.source


@pytest.mark.engine
def test_the_model_predicts_what_was_measured(run: Run) -> None:
    predicted_s = predict_s(run.profile.model, run.samples)
    ratios = sorted(s.duration_s / p for s, p in zip(run.samples, predicted_s, strict=True))
    # Loose, because the machine that runs this may be busy: the right model is not off by half on the median batch.
    assert 0.67 < ratios[len(ratios) // 2] < 1.5


@pytest.mark.engine
def test_the_command_prints_errors_by_region_and_draws_them(run: Run) -> None:
    held_out = json.loads((run.folder / "p.json").read_text(encoding="utf-8"))["fit"]  # few batches on a busy machine
    assert len(set(held_out) & {"decode only", "prefill only", "mixed"}) >= 2
    for words in (*held_out, "k_seq_s", "measured / predicted"):
        assert words in run.output
    assert (run.folder / "p.png").read_bytes().startswith(b"\x89PNG")
    assert run.report["num_samples"] == len(run.samples)
