"""What benchmarks.chaos puts between a replica and its routers: publications cut, and a clock that is off."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("zmq")

from benchmarks._chaos_hook.sitecustomize import ahead, disturb
from slos_serve.ray_serve.wire import Envelope
from tests.unit.routing.fleet import NOW_S, loaded, published


def envelope() -> Envelope:
    engine = loaded(3)
    engine.wait(500, due_in_s=2.0)
    return Envelope(NOW_S, False, json.dumps(published(engine).as_dict()).encode())


def test_a_clock_that_is_off_is_off_in_everything() -> None:
    sent, found = envelope(), ahead(envelope(), 7.0)
    before, after = sent.publication("a"), found.publication("a")
    assert found.sent_s == sent.sent_s + 7.0
    assert (after.time_s, after.ready_s) == pytest.approx((before.time_s + 7.0, before.ready_s + 7.0))
    assert after.seen_until_s == pytest.approx(before.seen_until_s + 7.0)
    assert len(before.due_s) == 1
    assert np.allclose(after.due_s, before.due_s + 7.0) and np.allclose(after.moments_s, before.moments_s + 7.0)


def test_files_cut_and_skew_what_a_replica_sends(tmp_path: Path) -> None:
    sent: list[Envelope] = []

    class Relay:
        def _send(self, message: Envelope) -> None:
            sent.append(message)

    disturb(SimpleNamespace(Relay=Relay), tmp_path)  # type: ignore[arg-type]  # a module has it too
    relay = Relay()
    relay._send(envelope())
    did = tmp_path / f"did-{os.getpid()}"
    assert not did.exists()
    (tmp_path / f"skew-{os.getpid()}").write_text("-3.5", encoding="ascii")
    relay._send(envelope())
    (tmp_path / f"cut-{os.getpid()}").touch()
    relay._send(envelope())
    assert did.exists()
    assert [message.sent_s - NOW_S for message in sent] == pytest.approx([0.0, -3.5])
