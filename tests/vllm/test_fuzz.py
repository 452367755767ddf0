"""A short, seeded part of ``python -m benchmarks.fuzz``, and that the fuzz notices what it looks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import SchedulerConfig

from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.config import CLASSES_ENV, PROFILE_ENV
from slos_serve.vllm_plugin.scheduler import SLOScheduler
from tests.vllm import fuzzing
from tests.vllm.dry_load import CLASSES, write_profile
from tests.vllm.episodes import SHARES, episode_of
from tests.vllm.fuzzing import Run, judged, run_episode, try_seed

SEEDS = range(60)


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a class file and a profile that the plug-in reads."""
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    write_profile(tmp_path / "profile.json", compat.engine_version())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(CLASSES_ENV, str(tmp_path / "classes.yaml"))
    monkeypatch.setenv(PROFILE_ENV, str(tmp_path / "profile.json"))
    return tmp_path


def test_random_episodes_end_as_on_stock(configured: Path) -> None:
    problems = {}
    for seed in SEEDS:
        verdict = try_seed(seed, configured)
        if verdict.problem:
            problems[seed] = verdict.problem
    assert not problems, f"{problems}; python -m benchmarks.fuzz --seed N --until N+1 shrinks one"


def test_every_feature_is_drawn() -> None:
    seen = set().union(*(episode_of(seed).features for seed in range(200)))
    missing = set() if hasattr(SchedulerConfig, "max_num_active_seqs") else {"active", "images", "sessions"}
    assert seen == set(SHARES) - missing


def test_an_episode_is_the_same_for_a_seed_and_keeps_its_rest_without_a_feature() -> None:
    seed = next(seed for seed in range(100) if {"lora", "aborts"} <= episode_of(seed).features)
    one, same, less = episode_of(seed), episode_of(seed), episode_of(seed, ["lora"])
    assert (one.arguments, sorted(one.events)) == (same.arguments, sorted(same.events))
    assert less.features == one.features - {"lora"}
    assert sorted(less.events) == sorted(one.events)
    assert less.sure == one.sure


def test_wrong_tokens_lost_requests_and_faults_are_noticed() -> None:
    episode = episode_of(0)
    name = sorted(episode.sure)[0]
    stock = Run(answers={name: [5, 6]}, worst_wait_s=1.0)
    assert judged(episode, stock, Run(answers={name: [5, 6]})) == ""
    assert "answers otherwise" in judged(episode, stock, Run(answers={name: [5, 7]}))
    assert "answers otherwise" in judged(episode, stock, Run(answers={name: [5]}))
    assert "no progress" in judged(episode, stock, Run(answers={name: [5, 6]}, worst_wait_s=12.0))
    assert "slots" in judged(episode, stock, Run(answers={name: [5, 6]}, faults=["3 requests in 2 slots"]))
    assert "steer" in judged(episode, stock, Run(answers={name: [5, 6]}, counts={"steer": 1, "unserved": 3}))
    assert judged(episode, stock, Run(error="KeyError")) == "KeyError"


def test_sessions_that_lock_vllm_are_told_from_requests_that_ours_starves(
    configured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "MOST_STEPS", 1000)
    if not hasattr(SchedulerConfig, "max_num_active_seqs"):
        pytest.skip("without streaming input")
    locked = run_episode(episode_of(359442), configured)  # stock: what ours plans would change which seed locks it
    assert locked.locked and locked.error.startswith("never finished")
    assert judged(episode_of(359442), Run(), locked) == ""

    class Starving(SLOScheduler):
        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            self.max_num_scheduled_tokens = 0 if self._slo is not None and self._slo.guard.armed else 2048
            return super().schedule(*args, **kwargs)

    starved = run_episode(episode_of(0), configured, Starving)
    assert not starved.locked and judged(episode_of(0), Run(), starved)


def test_sessions_that_vllm_loses_itself_are_told_from_requests_that_ours_does(configured: Path) -> None:
    if not hasattr(SchedulerConfig, "max_num_active_seqs"):
        pytest.skip("without streaming input")
    episode = episode_of(324296)
    lost = run_episode(episode, configured)  # stock: what ours plans would change which seed loses one
    assert lost.orphaned and lost.error == "never finished: ['r6']"
    assert judged(episode, Run(), lost) == ""
    assert judged(episode, Run(), Run(error=lost.error)) == lost.error


def test_adapters_that_vllm_lets_in_itself_are_told_from_those_that_ours_does(configured: Path) -> None:
    if not hasattr(SchedulerConfig, "max_num_active_seqs"):
        pytest.skip("the seed's episode is of a newer vLLM")
    stock = run_episode(episode_of(323), configured)
    assert stock.overfull and stock.error.startswith("AssertionError")
    episode, counts = episode_of(0), {"unserved": 1}
    assert judged(episode, Run(), Run(error="AssertionError: ", overfull=True, counts=counts)) == ""
    assert judged(episode, Run(), Run(error="AssertionError: ", counts=counts)) == "AssertionError: "
    assert "steer" in judged(episode, Run(), Run(error="AssertionError: ", overfull=True, counts={"steer": 1}))


def test_a_scheduler_that_forgets_a_request_is_noticed(configured: Path) -> None:
    class Forgetful(SLOScheduler):
        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            if len(self.running) > 2:
                self.running.pop()
            return super().schedule(*args, **kwargs)

    assert run_episode(episode_of(0), configured, Forgetful).error
