"""One side of the demo against a scripted server: what both sides send, and what a dying server leads to."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from slos_serve.bench import demo
from slos_serve.bench.demo import DemoFailedError, EngineSetup, Told, run_side
from slos_serve.bench.demo_plan import DemoPlan, DemoSettings, plan_demo
from slos_serve.bench.requests import Response
from slos_serve.vllm_plugin.launch import Plugin
from tests.unit.bench.builders import MODEL
from tests.unit.bench.sse_server import served

FAST = MODEL.scaled(0.02)
SETUP = EngineSetup("tiny", ("--enforce-eager",), {"A": "b"}, Path("profile.json"), FAST)


def fast_plan() -> DemoPlan:
    """A demo of half a second."""
    return plan_demo(FAST, DemoSettings(calm_s=0.2, burst_s=0.1))


class FakeServer:
    """Stands for vLLM's server process; notes how it was started."""

    started: list[dict[str, Any]]
    url: str

    def __init__(self, model: str, vllm_args: tuple[str, ...], **options: Any) -> None:
        self.base_url = self.url
        self.started.append({"model": model, "vllm_args": vllm_args, **options})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeServer]:
    server = type("Fake", (FakeServer,), {"started": [], "url": ""})
    monkeypatch.setattr(demo, "ServerProcess", server)
    return server


def test_both_sides_get_the_same_but_for_the_plugin(fake: type[FakeServer], tmp_path: Path) -> None:
    plan, phases = fast_plan(), []
    answers: list[Response] = []
    told = Told(phase=lambda name, count: phases.append((name, count)), answered=answers.append)
    sent = []
    for name, classes in (("stock", None), ("slos_serve", tmp_path / "classes.yaml")):
        with served() as server:
            fake.url = server.url
            side = run_side(SETUP, plan, tmp_path, name=name, classes=classes, told=told)
            sent.append([(call.headers.get("x-slo-class"), call.body) for call in server.calls])
        assert {phase: len(load.responses) for phase, load in side.loads.items()} == {
            "calm": len(plan.calm),
            "burst": len(plan.burst),
        }
    by_prompt = [sorted(calls, key=lambda call: str(call[1]["messages"])) for calls in sent]
    assert by_prompt[0] == by_prompt[1]
    stock, ours = fake.started
    assert stock["plugin"] is None
    assert ours["plugin"] == Plugin(tmp_path / "classes.yaml", SETUP.profile_path, tmp_path / "slos_serve-events.jsonl")
    for key in ("model", "vllm_args", "environment"):
        assert stock[key] == ours[key]
    assert [name for name, _ in phases] == ["warm", "calm", "burst"] * 2
    assert len(answers) == sum(count for _, count in phases)


def test_a_server_that_dies_is_no_result(fake: type[FakeServer], tmp_path: Path) -> None:
    with served(dies_after=9) as server:
        fake.url = server.url
        with pytest.raises(DemoFailedError, match=r"stock-server\.log"):
            run_side(SETUP, fast_plan(), tmp_path, name="stock", classes=None)
