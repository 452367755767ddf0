"""What the API process of a single server hears, and how often."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.routing.publication import Publication
from slos_serve.vllm_plugin.publish import DECODES_EVERY_S, FRONT_EVERY_S, FrontPublisher
from tests.builders import OPT_13B_A100, EngineBuilder
from tests.unit.routing.fleet import NOW_S, loaded

STEP_S = 0.035


def heard(
    engines: list[EngineBuilder], monkeypatch: pytest.MonkeyPatch, folder: Path, step_s: float = STEP_S
) -> list[float]:
    """Seconds, from the first step on, at which a publication was sent; a step every ``step_s``."""
    path = folder / "socket"
    path.touch()
    policy = SLOsServePolicy(OPT_13B_A100, 1)
    publisher = FrontPublisher(path, policy)
    sent: list[Publication] = []
    monkeypatch.setattr(publisher, "deliver", sent.append)
    for step, engine in enumerate(engines):
        now_s, view = NOW_S + step * step_s, engine.view()
        publisher.after_plan(now_s, view, replace(policy.plan(now_s, view), predicted_s=step_s), now_s)
        publisher.send()
    publisher.close()
    return [round(publication.time_s - NOW_S, 6) for publication in sent]


def test_steps_of_the_same_decodes_are_told_now_and_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times_s = heard([loaded(3)] * 20, monkeypatch, tmp_path)
    gaps_s = [later - earlier for earlier, later in pairwise(times_s[1:])]
    assert times_s[0] == 0.0 and 3 <= len(times_s) <= 5
    assert all(DECODES_EVERY_S <= gap_s < DECODES_EVERY_S + STEP_S + 1e-6 for gap_s in gaps_s)


def test_who_leaves_waits_or_has_a_prompt_left_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waiting, prompt = loaded(3), loaded(2)
    waiting.wait(200)
    prompt.prefilling(600, 100)
    for changed in (loaded(2), waiting, prompt):
        times_s = heard([loaded(3), loaded(3), loaded(3), changed], monkeypatch, tmp_path)
        assert times_s[-1] == pytest.approx(3 * STEP_S)


def test_a_snapshot_that_fails_costs_no_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no copy")

    monkeypatch.setattr("slos_serve.vllm_plugin.publish.snapshot_of", fails)
    assert heard([loaded(3)] * 20, monkeypatch, tmp_path) == []
    assert caplog.text.count("a publication failed") == 1


def test_with_short_steps_a_change_is_told_as_soon_as_it_may_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step_s = 0.001
    times_s = heard([loaded(3)] * 3 + [loaded(2)] * 60, monkeypatch, tmp_path, step_s)
    assert len(times_s) == 2 and 3 * step_s <= times_s[1] <= FRONT_EVERY_S
