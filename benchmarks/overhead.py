"""What the plug-in adds to a step of vLLM, and to an engine none of whose requests carries a promise.

Two measurements. First, vLLM's real scheduler and KV-cache manager on an imaginary device (256 running, 64 waiting
requests): the plan, all that the plug-in adds to ``schedule()``, and the stock ``schedule()`` beside it. Then the real
engine on this machine's cores: tokens a second with the plug-in on and no promises against stock, alternating in one
run. Exits 1 when that ratio is under 0.98.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RUNNING, WAITING, STEPS = 256, 64, 300
# Many short rounds: a shared machine changes speed within seconds, and a pair of them should see the same machine.
ROUNDS, REQUESTS, OUTPUT_TOKENS = 40, 8, 16
LEAST_RATIO = 0.98


def added_per_step(folder: Path) -> None:
    """Print p50 and p99 of the plan, of what is added in all, and of the stock schedule."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from slos_serve.files.profile_file import Profile, save_profile
    from slos_serve.testing.dry_engine import DryEngine, make_scheduler
    from slos_serve.vllm_plugin import compat
    from slos_serve.vllm_plugin.config import (
        CLASSES_ENV,
        EVENTS_ENV,
        PROFILE_ENV,
    )
    from slos_serve.vllm_plugin.identity import device_name
    from slos_serve.vllm_plugin.scheduler import SLOScheduler
    from tests.builders import OPT_13B_A100

    (folder / "classes.yaml").write_text(
        "classes:\n  a: {ttft_ms: 6000, tpot_ms: 150}\n  b: {ttft_ms: 9000, tpot_ms: 200}\n"
        "  c: {ttft_ms: 12000, tpot_ms: 300}\n",
        encoding="utf-8",
    )
    profile = Profile(
        folder.name,
        device_name(),
        "vllm",
        compat.engine_version(),
        "now",
        "bfloat16",
        1,
        10**6,
        16,
        2048,
        OPT_13B_A100,
    )
    save_profile(profile, folder / "profile.json")
    os.environ[CLASSES_ENV] = str(folder / "classes.yaml")
    os.environ[PROFILE_ENV] = str(folder / "profile.json")
    os.environ[EVENTS_ENV] = str(folder / "events.jsonl")
    rng = np.random.default_rng(0)
    stock_ms: list[float] = []
    for cls in (AsyncScheduler, SLOScheduler):
        scheduler = make_scheduler(cls, folder, num_blocks=40_000, max_num_seqs=RUNNING)
        engine = DryEngine(scheduler, OPT_13B_A100)
        scheduler.slo_clock_s = lambda engine=engine: engine.now_s
        schedule = scheduler.schedule

        def timed(schedule=schedule, keep=cls is AsyncScheduler):  # type: ignore[no-untyped-def]  # vLLM's is Any
            start_s = time.perf_counter()
            output = schedule()
            if keep:
                stock_ms.append((time.perf_counter() - start_s) * 1e3)
            return output

        scheduler.schedule = timed
        for number in range(RUNNING + WAITING):
            prompt = [int(token) for token in rng.integers(5, 30_000, int(rng.integers(20, 300)))]
            engine.add(f"r{number}", prompt, 4000, {"slo_class": "abc"[number % 3]})
        for _ in range(STEPS):
            engine.step()
        scheduler.shutdown()
    steps = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [step for step in steps if step["kind"] == "step" and step["num_running"] >= RUNNING // 2]
    print(f"{len(steps)} steps with {RUNNING // 2} to {RUNNING} running requests, fallbacks "
          f"{sum(step['fallback'] is not None for step in steps)}")  # fmt: skip
    for name, values in (
        ("plan", [step["plan_ms"] for step in steps]),
        ("added in all", [step["added_ms"] for step in steps]),
        ("stock schedule()", stock_ms[-STEPS // 2 :]),
    ):
        print(f"{name:>18}: p50 {np.percentile(values, 50):.3f} ms, p99 {np.percentile(values, 99):.3f} ms")


def generate(engine: object, seed: int) -> float:
    """Tokens a second of one round of greedy requests."""
    from vllm import SamplingParams

    rng = np.random.default_rng(seed)
    prompts = [{"prompt_token_ids": rng.integers(100, 40_000, 64).tolist()} for _ in range(REQUESTS)]
    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    start_s = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)  # type: ignore[attr-defined]  # vllm.LLM is Any here
    return REQUESTS * OUTPUT_TOKENS / (time.perf_counter() - start_s)


def throughput_ratio(folder: Path) -> float:
    """Median over rounds of (ours / stock) tokens a second; both engines are alive, one works at a time.

    Ours has classes and a batch-time profile, as in service; no request asks for a class.
    """
    from vllm import LLM

    from slos_serve.files.profile_file import Profile, save_profile
    from slos_serve.launch.cpu_engine import cpu_engine_args
    from slos_serve.launch.cpu_model import resolve_model
    from slos_serve.profiling.run import engine_identity
    from slos_serve.vllm_plugin.config import PROFILE_ENV
    from tests.builders import OPT_13B_A100

    dtype = cpu_engine_args()[1]
    common = {
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "enforce_eager": True,
        "dtype": dtype,
    }
    model = str(resolve_model("smollm2"))
    found = engine_identity(model, ("--dtype", dtype))
    # Its coefficients do not matter while nothing is planned; its identity is checked.
    profile = Profile(
        Path(model).name,
        str(found.device),
        "vllm",
        str(found.engine_version),
        "now",
        str(found.dtype),
        1,
        10**6,
        16,
        2048,
        OPT_13B_A100,
    )
    save_profile(profile, folder / "profile.json")
    os.environ[PROFILE_ENV] = str(folder / "profile.json")
    engines = {
        "stock": LLM(model, **common),
        "ours": LLM(model, scheduler_cls="slos_serve.vllm_plugin.SLOScheduler", **common),
    }
    for engine in engines.values():
        generate(engine, 0)
    ratios: list[float] = []
    rng = np.random.default_rng(0)
    for number in range(ROUNDS):
        order = ("stock", "ours") if number % 2 == 0 else ("ours", "stock")
        speed = {name: generate(engines[name], number + 1) for name in order}
        ratios.append(speed["ours"] / speed["stock"])
    low, high = np.quantile(np.median(rng.choice(ratios, (2000, ROUNDS)), axis=1), (0.025, 0.975))
    first, third = np.quantile(ratios, (0.25, 0.75))
    print(
        f"{ROUNDS} rounds, ours / stock: quartiles {first:.3f} and {third:.3f}; bootstrap 95 % interval of the median "
        f"{low:.3f} to {high:.3f}"
    )
    return float(np.median(ratios))


def main() -> int:
    """Print both measurements; 1 when the throughput ratio is under its limit."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        added_per_step(Path(folder))
        os.environ.pop("SLOS_SERVE_EVENTS", None)
        ratio = throughput_ratio(Path(folder))
    print(f"no promises, plug-in on / stock: {ratio:.3f} (median of {ROUNDS} alternating rounds)")
    return 1 if ratio < LEAST_RATIO else 0


if __name__ == "__main__":
    sys.exit(main())
