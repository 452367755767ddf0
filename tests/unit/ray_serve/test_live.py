"""The live page of many replicas: engines added up, a row a replica, what the endpoint told clients."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from slos_serve.core.verdict import Verdict, Why
from slos_serve.ray_serve.live import FleetLive, ReplicaLive, added_up, replica_row
from slos_serve.ray_serve.ticket import Ticket
from slos_serve.routing.router import RoutingDecision
from slos_serve.vllm_plugin.front.link import OutcomeLink, socket_path
from slos_serve.vllm_plugin.live.feed import LIVE_KEY
from tests.unit.routing.fleet import loaded, published, request
from tests.unit.vllm_plugin.live.builders import CLASSES, Engine

CHAT = CLASSES.classes["chat"]


def engine(folder: Path, kept: int, broken: int) -> Engine:
    """An engine after so many promises."""
    made = Engine(folder)
    made.watched.touch()
    for number in range(kept + broken):
        made.ends(CHAT, Verdict.ADMITTED, kept=number < kept)
    made.steps({"a": 30, "b": 1}, {}, 0.05)
    made.queues((1, 2, 3), (0, 1, 0))
    made.after(1.0)
    return made


def test_engines_are_added_up(tmp_path: Path) -> None:
    one, two = engine(tmp_path, 2, 1).wire.newest(), engine(tmp_path, 1, 0).wire.newest()
    two = {**two, "armed": False, "streams": [{"verdict": "no-slo", "slack_ms": None}]}
    one = {**one, "streams": [{"verdict": "best-effort", "slack_ms": -9.0}, {"verdict": "admitted", "slack_ms": 5.0}]}
    total = added_up([one, two])
    assert total["requests"] == {"chat": {"admitted": 4}} and total["attained"] == {"chat": {"admitted": 3}}
    assert total["queue"] == {"running": [2, 4, 6], "waiting": [0, 2, 0]}
    assert total["armed"] is False and len(total["steps"]) == 2
    assert [stream["slack_ms"] for stream in total["streams"]] == [5.0, -9.0, None]


def test_a_document_of_two_replicas_one_of_which_has_said_nothing(tmp_path: Path) -> None:
    fleet = FleetLive("m", tuple(CLASSES))
    asked = request(200, due_in_s=1.0)
    for verdict, why in ((Verdict.ADMITTED, Why.FITS_AT_PREFIX), (Verdict.REJECTED, Why.ALL_FULL)):
        fleet.told(Ticket(asked, slo_class="chat", decision=RoutingDecision("a", verdict, why)))
    fleet.told(Ticket(asked, slo_class="chat"))
    first = {"engine": engine(tmp_path, 1, 1).wire.newest(), "row": replica_row("b", published(loaded(3)))}
    document = fleet.document([first, {"engine": None, "row": replica_row("a", None)}])
    assert [row["name"] for row in document["replicas"]] == ["a", "b"]
    assert document["replicas"][0]["requests"] is None and document["replicas"][1]["requests"] == 3
    chat = document["classes"][0]
    assert (chat["requests"], chat["attained"]) == ({"admitted": 2}, {"admitted": 1})
    assert chat["told"] == {"admitted": 1, "rejected": 1}
    assert [each["reason"] for each in document["verdicts"]] == ["all_full", "fits_at_prefix"]
    assert document["armed"] is True and document["queue"]["waiting"] == [0, 1, 0]
    json.dumps(document, allow_nan=False)


def test_nothing_is_shown_before_an_engine_has_said_anything() -> None:
    document = FleetLive("m", tuple(CLASSES)).document([])
    assert document["replicas"] == [] and document["armed"] is None


def test_a_replica_keeps_what_its_engine_sends(tmp_path: Path) -> None:
    live, path = ReplicaLive(), socket_path("watched", os.getpid())
    assert path is not None
    link = OutcomeLink(os.getpid())
    try:
        until_s = time.monotonic() + 20.0
        while live.told("a", None)["engine"] is None:
            assert time.monotonic() < until_s
            link.write({"request_id": "x"})
            link.write({LIVE_KEY: engine(tmp_path, 1, 0).wire.newest()})
            time.sleep(0.05)
        assert path.exists(), "its engine hears that somebody looks"
        assert live.told("a", None)["engine"]["requests"] == {"chat": {"admitted": 1}}
    finally:
        link.close()
        live.close()
    assert not path.exists()


@pytest.mark.parametrize("payload", [b'{"request_id": "x"}', b'{"live": {"armed": true}}'])
def test_only_messages_for_the_page_are_kept(payload: bytes) -> None:
    live = ReplicaLive()
    live.heard(payload)
    live.close()
    assert (live.told("a", None)["engine"] is not None) is (b"live" in payload)
