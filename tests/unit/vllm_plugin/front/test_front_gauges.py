"""What a single server shows of its room, for routers of others and for scaling."""

from __future__ import annotations

from pathlib import Path

import pytest

from slos_serve.routing.headroom import MOST
from slos_serve.vllm_plugin.front.desk import FrontDesk
from tests.unit.routing.fleet import loaded
from tests.unit.vllm_plugin.front.builders import Server, desk


def shown(front: FrontDesk, name: str, **labels: str) -> float:
    front._gauges_s = -1e9
    front._post_gauges()
    found = front.metrics.registry.get_sample_value(f"slos_serve:{name}", {"model_name": "m", "engine": "0"} | labels)
    assert found is not None
    return found


def test_room_is_shown_before_anybody_has_asked(tmp_path: Path) -> None:
    idle, busy = desk(tmp_path, loaded(0)), desk(tmp_path, loaded(150, total_blocks=3000))
    assert 0 < shown(idle, "least_headroom_requests") <= MOST
    assert shown(busy, "least_headroom_requests") < shown(idle, "least_headroom_requests")
    assert shown(busy, "standard_ttft_seconds") > shown(idle, "standard_ttft_seconds") > 0.0
    assert shown(busy, "next_tpot_seconds") > shown(idle, "next_tpot_seconds") > 0.0
    longest = [shown(front, "headroom_prefill_tokens", slo_class="chat") for front in (busy, idle)]
    assert 0 < longest[0] < longest[1]


async def test_the_class_with_least_room_counts_and_real_requests_replace_the_standard_one(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    before = shown(front, "headroom_requests", slo_class="chat")
    await Server(front).ask("chat", prompt_tokens=4000)
    after = shown(front, "headroom_requests", slo_class="chat")
    assert after < before
    assert shown(front, "least_headroom_requests") <= after


def test_nothing_is_shown_of_a_server_that_has_not_published(tmp_path: Path) -> None:
    assert shown(desk(tmp_path), "least_headroom_requests") == pytest.approx(0.0)


def test_a_fault_beside_the_messages_ends_no_hearing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    front = desk(tmp_path, loaded(0))
    looked: list[float] = []
    monkeypatch.setattr(front, "look_at_file", looked.append)
    monkeypatch.setattr("slos_serve.vllm_plugin.front.desk.headroom", lambda *_: 1 / 0)
    for now_s in (1.0, 2.0):
        front._gauges_s = -1e9
        front.turn(now_s)
    assert looked == [1.0, 2.0] and caplog.text.count("said once") == 1
