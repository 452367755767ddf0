"""The profiling scheduler on vLLM's real scheduling code and an imaginary device: it steers and measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm")

from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.fit import Sample
from slos_serve.profiling.run import read_raw_samples
from slos_serve.profiling.scheduler import (
    MAX_DECODES_ENV,
    SAMPLES_ENV,
    SEED_ENV,
    WARM_UP_STEPS,
    ProfilingScheduler,
)
from slos_serve.testing.dry_engine import DryEngine, make_scheduler, token_at

DEVICE = BatchTimeModel(k_c_s=1e-3, b_c_s=1e-2, k_m_s=0.0, b_m_s=0.0)
STEPS = 600
MAX_DECODES = 12


def drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> tuple[DryEngine, list[Sample], dict[str, int]]:
    """Keep a pool decoding and prompts coming for :data:`STEPS` steps; returns engine, samples and facts."""
    file = tmp_path / "samples.jsonl"
    for name, value in (
        (SAMPLES_ENV, str(file)),
        (SEED_ENV, "1"),
        (MAX_DECODES_ENV, str(MAX_DECODES)),
    ):
        monkeypatch.setenv(name, value)
    scheduler = make_scheduler(ProfilingScheduler, tmp_path, num_blocks=4000, enable_prefix_caching=False)
    engine, rng = DryEngine(scheduler, DEVICE, depth=depth), np.random.default_rng(0)
    for i in range(MAX_DECODES):
        engine.add(f"pool-{i}", rng.integers(3, 30_000, 16 + 120 * i).tolist(), max_tokens=5000)
    for step in range(STEPS):
        while len(scheduler.waiting) < 8:
            name = f"feed-{step}-{len(engine.answers)}"
            engine.add(
                name,
                rng.integers(3, 30_000, int(rng.integers(32, 3000))).tolist(),
                max_tokens=1,
            )
        engine.step()
    scheduler.shutdown()
    facts, measured = read_raw_samples(file)
    assert all(stolen >= 0.0 for _, stolen in measured)
    return engine, [sample for sample, _ in measured], facts


@pytest.mark.parametrize("depth", [1, 2], ids=["in step", "one ahead"])
def test_every_region_is_measured_and_answers_stay_right(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, samples, facts = drive(tmp_path, monkeypatch, depth)
    assert STEPS - WARM_UP_STEPS - 10 <= len(samples) <= STEPS
    decode_only = {s.shape.num_seqs for s in samples if s.prefill_tokens == 0}
    assert decode_only >= {1, 2, 3, 4, MAX_DECODES}
    assert max(decode_only) == MAX_DECODES
    assert sum(s.prefill_tokens == s.shape.new_tokens for s in samples) > 50
    assert sum(0 < s.prefill_tokens < s.shape.new_tokens for s in samples) > 50
    chunk_after_done = [s for s in samples if s.prefill_tokens and s.shape.quad_tokens2 > 4 * s.prefill_tokens**2]
    assert len(chunk_after_done) > 20
    assert max(s.prefill_tokens for s in samples) > 1024
    assert facts["max_num_batched_tokens"] == 2048
    assert facts["kv_capacity_tokens"] == 4000 * 16
    for name, answer in engine.answers.items():
        prompt = engine.scheduler.requests[name].prompt_token_ids if name in engine.scheduler.requests else None
        if prompt is not None:
            assert answer == [token_at(prompt, k) for k in range(len(answer))]


def test_the_same_number_of_decodes_is_measured_with_little_and_much_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, samples, _ = drive(tmp_path, monkeypatch, depth=1)
    contexts = [s.shape.context_tokens for s in samples if s.prefill_tokens == 0 and s.shape.num_seqs == 4]
    assert max(contexts) > 2 * min(contexts)
