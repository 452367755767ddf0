"""The demo against scripted servers: what both sides get, in which order, and what a dying server leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slos_serve.bench import demo
from slos_serve.bench.demo import DemoFailedError, EngineSetup, Told, run_sides, turns
from slos_serve.bench.demo_plan import DemoPlan, DemoSettings, plan_demo
from slos_serve.bench.demo_report import OURS, STOCK
from slos_serve.bench.requests import Response
from slos_serve.vllm_plugin.config import PluginConfig
from tests.unit.bench.builders import MODEL
from tests.unit.bench.sse_server import served

FAST = MODEL.scaled(0.02)
SETUP = EngineSetup("tiny", ("--enforce-eager",), {"A": "b"}, Path("profile.json"), FAST)


def fast_plan() -> DemoPlan:
    """A demo of half a second."""
    return plan_demo(FAST, DemoSettings(calm_s=0.2, burst_s=0.1))


class FakeServer:
    """Stands for vLLM's server process; notes how it was started and stopped."""

    started: list[dict[str, Any]]
    stopped: list[str]
    urls: dict[bool, str]

    def __init__(self, model: str, vllm_args: tuple[str, ...], **options: Any) -> None:
        self.base_url = self.urls[options["plugin"] is not None]
        self.options = {"model": model, "vllm_args": vllm_args, **options}

    def start(self) -> None:
        self.started.append(self.options)

    def wait_ready(self) -> None:
        assert len(self.started) == 2, "both start side by side"

    def stop(self) -> None:
        self.stopped.append(self.base_url)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeServer]:
    server = type("Fake", (FakeServer,), {"started": [], "stopped": [], "urls": {}})
    monkeypatch.setattr(demo, "ServerProcess", server)
    return server


def test_both_sides_get_the_same_but_for_the_plugin(fake: type[FakeServer], tmp_path: Path) -> None:
    plan = fast_plan()
    phases: list[tuple[str, str, int]] = []
    answers: list[Response] = []
    told = Told(phase=lambda *turn: phases.append(turn), answered=answers.append)
    with served() as stock_server, served() as our_server:
        fake.urls = {False: stock_server.url, True: our_server.url}
        sides = run_sides(SETUP, plan, tmp_path, classes=tmp_path / "classes.yaml", told=told)
        sent = [
            sorted(((call.headers.get("x-slo-class"), call.body) for call in server.calls), key=lambda c: str(c[1]))
            for server in (stock_server, our_server)
        ]
    assert sent[0] == sent[1]
    for side in sides.values():
        assert {phase: len(load.responses) for phase, load in side.loads.items()} == {
            "calm": len(plan.calm),
            "burst": len(plan.burst),
        }
    stock, ours = fake.started
    assert stock["plugin"] is None
    assert ours["plugin"] == PluginConfig(
        classes_path=tmp_path / "classes.yaml",
        profile_path=SETUP.profile_path,
        events_path=tmp_path / "slos_serve-events.jsonl",
    )
    for key in ("model", "vllm_args", "environment"):
        assert stock[key] == ours[key]
    assert sorted(fake.stopped) == sorted(fake.urls.values())
    assert len(answers) == sum(count for _, _, count in phases)


def test_the_calm_phase_goes_back_and_forth() -> None:
    plan = fast_plan()
    order = [(side, phase) for side, phase, _ in turns(plan)]
    calm = [(STOCK, "calm"), (OURS, "calm"), (OURS, "calm"), (STOCK, "calm")]
    assert order == [(STOCK, "warm"), (OURS, "warm"), *calm, (STOCK, "burst"), (OURS, "burst")]
    assert all(0.0 <= request.arrival_s <= 0.1 for part in plan.calm_parts for request in part)


def test_a_server_that_dies_is_no_result(fake: type[FakeServer], tmp_path: Path) -> None:
    with served(dies_after=9) as server:
        fake.urls = {False: server.url, True: server.url}
        with pytest.raises(DemoFailedError, match=r"stock-server\.log"):
            run_sides(SETUP, fast_plan(), tmp_path, classes=tmp_path / "classes.yaml")
    assert len(fake.stopped) == 2
