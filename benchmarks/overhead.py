"""What the plug-in adds to a step of vLLM, and to an engine none of whose requests carries a promise.

Two measurements. First, vLLM's real scheduler and KV-cache manager on an imaginary device (256 running requests, 64 and
2,000 waiting): view and plan, all that the plug-in adds to ``schedule()``, and the stock ``schedule()`` beside it
(``--steps-only`` ends here). Then the real engine on this machine's cores: tokens a second with the plug-in on and no
promises against stock, alternating in one run. Exits 1 when that ratio is under 0.98.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RUNNING, WAITING, STEPS = 256, (64, 2000), 400
# Many short rounds: a shared machine changes speed within seconds, and a pair of them should see the same machine.
ROUNDS, REQUESTS, OUTPUT_TOKENS = 40, 8, 16
LEAST_RATIO = 0.98


def prepare(folder: Path) -> None:
    """Classes and a profile for the tiny model whose configuration the test tool writes into ``folder``."""
    from slos_serve.files.profile_file import Profile, save_profile
    from slos_serve.vllm_plugin import compat
    from slos_serve.vllm_plugin.config import CLASSES_ENV, PROFILE_ENV
    from slos_serve.vllm_plugin.identity import device_name
    from tests.builders import OPT_13B_A100

    (folder / "classes.yaml").write_text(
        "classes:\n  a: {ttft_ms: 6000, tpot_ms: 150}\n  b: {ttft_ms: 9000, tpot_ms: 200}\n"
        "  c: {ttft_ms: 12000, tpot_ms: 300}\n",
        encoding="utf-8",
    )
    version = compat.engine_version()
    profile = Profile(
        folder.name, device_name(), "vllm", version, "now", "bfloat16", 1, 10**6, 16, 2048, OPT_13B_A100
    )  # fmt: skip
    save_profile(profile, folder / "profile.json")
    os.environ[CLASSES_ENV] = str(folder / "classes.yaml")
    os.environ[PROFILE_ENV] = str(folder / "profile.json")


def added_per_step(folder: Path, waiting: int) -> None:
    """Print p50 and p99 of processor time: view and plan, all that the plug-in adds, the stock ``schedule()``.

    ``RUNNING`` requests decode; ``waiting`` ones wait. Each one that ends or starts is replaced, so that admission has
    something to decide in every step.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from slos_serve.testing.dry_engine import DryEngine
    from slos_serve.testing.scheduler import make_scheduler
    from slos_serve.vllm_plugin.scheduler import SLOScheduler
    from tests.builders import OPT_13B_A100

    whole: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {"view and plan": [], "stock schedule()": []}
    verdicts = {"admitted": 0, "declined": 0}
    for name, cls in (("stock", AsyncScheduler), ("ours", SLOScheduler)):
        scheduler = make_scheduler(cls, folder, num_blocks=60_000, max_num_seqs=RUNNING)
        engine = DryEngine(scheduler, OPT_13B_A100)
        scheduler.slo_clock_s = lambda engine=engine: engine.now_s
        times = whole[name] = []
        if name == "ours":
            _time_parts(scheduler, parts, verdicts)
        schedule = scheduler.schedule

        def timed(*args, schedule=schedule, times=times, **kwargs):  # type: ignore[no-untyped-def]  # vLLM's is Any
            start_s = time.thread_time()
            output = schedule(*args, **kwargs)
            times.append((time.thread_time() - start_s) * 1e3)
            return output

        scheduler.schedule = timed
        _drive(engine, waiting)
        scheduler.shutdown()
    steps = STEPS // 2
    print(
        f"{waiting} waiting, {RUNNING} running; per plan {verdicts['admitted'] / STEPS:.2f} admitted, "
        f"{verdicts['declined'] / STEPS:.2f} given up; processor ms:"
    )
    for label, values in (
        ("view and plan", parts["view and plan"][-steps:]),
        ("whole schedule(), ours", whole["ours"][-steps:]),
        ("whole schedule(), stock", whole["stock"][-steps:]),
    ):
        print(f"{label:>26}: p50 {np.percentile(values, 50):.3f}, p99 {np.percentile(values, 99):.3f}")
    added = np.percentile(whole["ours"][-steps:], 50) - np.percentile(parts["stock schedule()"][-steps:], 50)
    print(f"{'added by the plug-in':>26}: p50 {added:.3f}")


def _time_parts(scheduler: object, parts: dict[str, list[float]], verdicts: dict[str, int]) -> None:
    """Measure the proposal, and vLLM's own ``schedule()`` under ours, of one steered scheduler."""
    control = scheduler._slo  # type: ignore[attr-defined]  # vLLM's is Any
    propose, make = control._propose, control.schedule

    def proposing():  # type: ignore[no-untyped-def]
        start_s = time.thread_time()
        found = propose()
        parts["view and plan"].append((time.thread_time() - start_s) * 1e3)
        if found is not None:
            verdicts["admitted"] += len(found.plan.admitted)
            verdicts["declined"] += len(found.plan.demoted)
        return found

    def making(stock, throttle):  # type: ignore[no-untyped-def]
        def timed_stock():  # type: ignore[no-untyped-def]
            start_s = time.thread_time()
            output = stock()
            parts["stock schedule()"].append((time.thread_time() - start_s) * 1e3)
            return output

        return make(timed_stock, throttle)

    control._propose, control.schedule = proposing, making


def _drive(engine: object, waiting: int) -> None:
    """Fill the engine and step it; what ends is replaced."""
    rng = np.random.default_rng(0)
    scheduler = engine.scheduler  # type: ignore[attr-defined]  # vLLM's is Any
    number = 0
    for step in range(STEPS):
        while len(scheduler.requests) < RUNNING + waiting:
            prompt = [int(token) for token in rng.integers(5, 30_000, int(rng.integers(20, 300)))]
            answer = int(rng.integers(50, 400)) if step else int(rng.integers(20, 800))
            engine.add(f"r{number}", prompt, answer, {"slo_class": "abc"[number % 3]})  # type: ignore[attr-defined]
            number += 1
        engine.step()  # type: ignore[attr-defined]


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
        prepare(Path(folder))
        for waiting in WAITING:
            added_per_step(Path(folder), waiting)
        if "--steps-only" in sys.argv:
            return 0
        ratio = throughput_ratio(Path(folder))
    print(f"no promises, plug-in on / stock: {ratio:.3f} (median of {ROUNDS} alternating rounds)")
    return 1 if ratio < LEAST_RATIO else 0


if __name__ == "__main__":
    sys.exit(main())
