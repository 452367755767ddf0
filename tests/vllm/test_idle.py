"""What an engine says last: that it rests. Nobody hears from it again until a request comes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("vllm")

from slos_serve.routing.publication import Publication
from slos_serve.testing.request import RequestFeatures
from slos_serve.testing.scheduler import Setup
from slos_serve.vllm_plugin.publish import EnginePublisher
from tests.vllm.dry_load import Start, prompt


@pytest.mark.parametrize("send_steps", [0, 50])
def test_the_last_answer_is_the_end_also_where_its_kv_is_still_being_sent(
    start: Start, monkeypatch: pytest.MonkeyPatch, send_steps: int
) -> None:
    """A router takes an engine that has requests and says nothing for one that is in trouble, and refuses."""
    engine = start(num_blocks=1000, setup=Setup(kv_role="kv_both"))
    control, sent = engine.scheduler._slo, list[Publication]()
    control.publisher = EnginePublisher("ipc:///nonexistent/engine", control.policy, every_s=10.0)
    monkeypatch.setattr(control.publisher, "deliver", sent.append)
    engine.add("r", prompt(np.random.default_rng(1), 100), 5, None, RequestFeatures(send_steps=send_steps))
    while len(engine.answers["r"]) < 5:
        engine.step()
    assert [publication.num_requests for publication in sent] == [1, 0]
