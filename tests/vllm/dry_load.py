"""A load for the dry engine, and what its answers have to be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.testing.dry_engine import DryEngine, make_scheduler, token_at
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.config import CLASSES_ENV, EVENTS_ENV, PLAN_LIMIT_ENV, PROFILE_ENV
from slos_serve.vllm_plugin.identity import device_name
from slos_serve.vllm_plugin.scheduler import SLOScheduler, Steered
from tests.builders import OPT_13B_A100

CLASSES = """
classes:
  chat: {ttft_ms: 1000, tpot_ms: 100}
  code: {ttft_ms: 800, tpot_ms: 50}
  think:
    ttft_ms: 1000
    stages: [{tpot_ms: 50, max_tokens: 20}, {tpot_ms: 100}]
"""
Start = Callable[..., DryEngine]
started: list[Steered] = []


class AsyncSLOScheduler(SLOScheduler):
    """Ours with steps in flight, whatever vLLM resolves for the drafter (n-grams switch async scheduling off)."""


def write_profile(path: Path, engine_version: str) -> None:
    """A profile of the model in the file's own folder on this machine."""
    model, device = path.parent.name, device_name()
    profile = Profile(
        model,
        device,
        "vllm",
        engine_version,
        "now",
        "bfloat16",
        1,
        64_000,
        16,
        2048,
        OPT_13B_A100,
    )
    save_profile(profile, path)


def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """What starts engines, ours unless told otherwise; they end with it."""
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    write_profile(tmp_path / "profile.json", compat.engine_version())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(CLASSES_ENV, str(tmp_path / "classes.yaml"))
    monkeypatch.setenv(PROFILE_ENV, str(tmp_path / "profile.json"))
    monkeypatch.setenv(EVENTS_ENV, str(tmp_path / "events.jsonl"))
    # Time is virtual here: that this machine was slow for a moment must not make a step stock.
    monkeypatch.setenv(PLAN_LIMIT_ENV, "60000")

    started.clear()

    def start_engine(cls: type[AsyncScheduler] = SLOScheduler, *, depth: int = 2, **arguments: Any) -> DryEngine:
        chosen = AsyncSLOScheduler if cls is SLOScheduler and depth > 1 else cls
        scheduler = make_scheduler(chosen, tmp_path, **arguments)
        if isinstance(scheduler, Steered):
            started.append(scheduler)
        engine = DryEngine(scheduler, OPT_13B_A100, depth=depth)
        scheduler.slo_clock_s = lambda: engine.now_s
        return engine

    yield start_engine
    for scheduler in started:
        scheduler.shutdown()


def prompt(rng: np.random.Generator, tokens: int) -> list[int]:
    return [int(token) for token in rng.integers(5, 30_000, tokens)]


def mixed_load(
    engine: DryEngine,
    *,
    seed: int = 0,
    count: int = 80,
    rate: float = 8.0,
    slo: bool = True,
) -> list[float]:
    """Poisson arrivals of two classes and of requests without a promise, served to the end; when each was entered."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1.0 / rate, count))
    entered = []
    for number, arrival_s in enumerate(arrivals):
        tokens = prompt(rng, min(int(rng.lognormal(6.0, 1.0)) + 1, 4000))
        length = int(rng.lognormal(4.0, 0.8)) + 1
        name = (None, "chat", "code")[number % 3] if slo else None
        while engine.now_s < arrival_s:
            if engine.step() == 0 and not engine.scheduler.has_unfinished_requests():
                engine.now_s = float(arrival_s)
        engine.add(f"r{number}", tokens, length, {"slo_class": name} if name else None)
        entered.append(engine.now_s)
        lengths[f"r{number}"] = (tokens, length)
    engine.run()
    return entered


lengths: dict[str, tuple[list[int], int]] = {}


def assert_answers(engine: DryEngine) -> None:
    for key, answer in engine.answers.items():
        tokens, length = lengths[key]
        assert answer == [token_at(tokens, position) for position in range(length)], key


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    for scheduler in started:
        if scheduler._slo is not None:
            scheduler._slo.telemetry.flush()
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def assert_all_served(engine: DryEngine, folder: Path, *, preempts: bool) -> None:
    """The answers are right, decodes were held, no plan failed, and nothing of :func:`mixed_load` is left behind."""
    assert_answers(engine)
    steps = events(folder, "step")
    assert sum(step["held"] for step in steps) > 0  # few: decodes wait only for prompts that need the time
    assert all(step["fallback"] in (None, "empty_plan") for step in steps)
    assert engine.scheduler._slo.guard.counts == {}
    assert (sum(step["preempted"] for step in steps) > 0) is preempts
    assert len(engine.finished) == 80
    assert engine.scheduler.kv_cache_manager.usage == 0.0
    assert not engine.scheduler._slo.book.by_id
