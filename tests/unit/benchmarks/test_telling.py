"""``python -m benchmarks.telling``: who works when, what a ratio is of, its interval; with clients that only count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from benchmarks import telling
from benchmarks.telling import WITH, WITHOUT, Settings, alternate, interval

SEEN: list[tuple[str, str, int]] = []
SPEED = {"headers": 19.0, "body": 20.0}
STEPS = {"headers": 0, "body": 100}


class Client:
    """Answers ten requests with ten tokens each in the time that the side's speed gives."""

    def __init__(self, settings: Any) -> None:
        self.slo_in = settings.slo_in

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is open."""

    async def run(self, requests: list[int]) -> SimpleNamespace:
        kind = "warm" if requests == [0] else "burst"
        SEEN.append((self.slo_in, kind, requests[0]))
        verdict = "admitted" if self.slo_in == "headers" else None
        answer = SimpleNamespace(status=200, output_tokens=10, verdict=verdict, error="")
        STEPS[self.slo_in] += 7
        return SimpleNamespace(responses=[answer] * 10, wall_s=100.0 / SPEED[self.slo_in])


async def test_sides_take_turns_with_the_same_bursts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(_model: object, settings: Any) -> SimpleNamespace:
        return SimpleNamespace(warm_up=[0], burst=[settings.seed], classes=None)

    monkeypatch.setattr("slos_serve.bench.client.LoadClient", Client)
    monkeypatch.setattr("slos_serve.bench.demo_plan.plan_demo", plan)
    monkeypatch.setattr("slos_serve.files.profile_file.load_profile", lambda _: SimpleNamespace(model=None))
    monkeypatch.setattr(telling, "_profile", lambda _: Path("p"))
    sides = {"http://a": "headers", "http://b": "body"}
    monkeypatch.setattr(telling, "steps_of", lambda url: STEPS[sides[url]])
    monkeypatch.setattr(
        "slos_serve.bench.scoring.score_responses",
        lambda responses, *_: [SimpleNamespace(has_slo=n > 0, attained=n < 5) for n in range(len(responses))],
    )
    SEEN.clear()
    ratios = await alternate({WITH: "http://a", WITHOUT: "http://b"}, Settings(2, 1.0, 100, "m"))
    assert ratios == pytest.approx([0.95, 0.95])
    bursts = [(side, seed) for side, kind, seed in SEEN if kind == "burst"]
    assert bursts == [("headers", 100), ("body", 100), ("body", 101), ("headers", 101)]
    assert [side for side, kind, _ in SEEN if kind == "warm"] == ["headers", "body"]
    printed = capsys.readouterr().out
    assert "with: 19.0 tokens/s, 4 kept, 7 steps of 751.9 ms" in printed
    assert "without: 20.0 tokens/s, 4 kept, 7 steps of 714.3 ms" in printed


def test_steps_are_those_of_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (
        "# TYPE vllm:iteration_tokens_total histogram\n"
        'vllm:iteration_tokens_total_bucket{engine="0",le="1.0"} 3.0\n'
        'vllm:iteration_tokens_total_count{engine="0"} 12.0\n'
        'vllm:iteration_tokens_total_count{engine="1"} 30.0\n'
    )
    monkeypatch.setattr("httpx.get", lambda url, **_: SimpleNamespace(text=page if url == "http://a/metrics" else ""))
    assert (telling.steps_of("http://a"), telling.steps_of("http://b")) == (42, 0)


def test_the_interval_holds_the_mean_and_is_narrow_where_rounds_agree() -> None:
    mean, low, high = interval([0.98, 1.0, 1.02, 1.0])
    assert mean == pytest.approx(1.0) and 0.98 <= low < mean < high <= 1.02
    assert interval([0.9, 0.9]) == pytest.approx((0.9, 0.9, 0.9))
