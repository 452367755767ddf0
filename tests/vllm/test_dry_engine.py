"""The dry engine itself: vLLM's own schedulers pass every scene on it, and it notices what workers could not do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from slos_serve.testing.dry_engine import DryEngine
from slos_serve.testing.request import RequestFeatures
from slos_serve.testing.scheduler import Setup, make_scheduler
from slos_serve.vllm_plugin import compat
from tests.builders import OPT_13B_A100
from tests.vllm.feature_probes import Scene, play
from tests.vllm.scenes import SCENES

BY_NAME = {scene.name: scene for scene in SCENES}


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_stock_plays_every_scene(scene: Scene, tmp_path: Path) -> None:
    if scene.name in ("max_num_active_seqs", "images") and compat.version_of(compat.engine_version()) < (0, 31):
        pytest.skip("this scene needs vLLM 0.31")
    outcome = play(scene, tmp_path)
    assert (outcome.error, outcome.refused, outcome.faults) == ("", "", [])
    assert all(outcome.first.values())
    assert all(answer or name in outcome.aborted for name, answer in outcome.answers.items())


def test_decodes_without_their_token_come_out_wrong(tmp_path: Path) -> None:
    scene = BY_NAME["pipeline parallel, no async"]
    right, wrong = play(scene, tmp_path), play(scene, tmp_path, AsyncScheduler)
    assert "unknown inputs" in wrong.faults[-1]
    assert wrong.answers != right.answers


def test_a_grammar_is_ready_after_its_steps(tmp_path: Path) -> None:
    scheduler = make_scheduler(AsyncScheduler, tmp_path)
    engine = DryEngine(scheduler, OPT_13B_A100)
    engine.add("json", [5] * 20, 4, features=RequestFeatures(grammar_steps=6))
    engine.run()
    assert engine.token_steps["json"][0] == 8
    scheduler.shutdown()


def test_a_load_counts_as_computed_and_takes_its_steps(tmp_path: Path) -> None:
    outcome = play(BY_NAME["KV connector, remote prefill"], tmp_path)
    first = outcome.first["loaded"]
    assert first is not None
    assert first[0] == 6
    assert first[1] < 0.2, "2,000 tokens computed here would take longer"


def test_a_stop_string_cuts_the_answer_as_an_abort(tmp_path: Path) -> None:
    scheduler = make_scheduler(AsyncScheduler, tmp_path)
    engine = DryEngine(scheduler, OPT_13B_A100)
    engine.add("cut", [5] * 20, 100, features=RequestFeatures(stop_after=7))
    engine.run()
    assert (len(engine.answers["cut"]), engine.finished["cut"]) == (7, "stop string")
    assert scheduler.kv_cache_manager.usage == 0.0
    scheduler.shutdown()


def test_a_full_prefix_cache_reset_gives_the_same_answers(tmp_path: Path) -> None:
    def reset(times: int) -> dict[str, list[int]]:
        scheduler = make_scheduler(AsyncScheduler, tmp_path)
        engine = DryEngine(scheduler, OPT_13B_A100)
        for number in range(4):
            engine.add(f"r{number}", [5 + number] * 50, 40)
        for _ in range(times):
            for _ in range(5):
                engine.step()
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.run()
        scheduler.shutdown()
        return engine.answers

    assert reset(0) == reset(3)


def test_the_slots_of_the_workers_are_counted(tmp_path: Path) -> None:
    scene = replace(BY_NAME["model runner V2"], arguments={"max_num_seqs": 64})
    assert play(scene, tmp_path).faults == []
    scheduler = make_scheduler(AsyncScheduler, tmp_path, setup=Setup(runner_v2=True), max_num_seqs=2)
    scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = 3
    engine = DryEngine(scheduler, OPT_13B_A100)
    for number in range(3):
        engine.add(f"r{number}", [5 + number] * 50, 10)
    engine.run()
    assert "3 requests in 2 slots" in engine.faults[0]
    scheduler.shutdown()
