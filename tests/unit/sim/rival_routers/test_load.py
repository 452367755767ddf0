"""What a replica holds, and steps projected with one more call."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.policies.vllm_order import VllmOrder
from slos_serve.sim.limits import ReplicaSettings
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.rival_routers.load import (
    CHUNK_TOKENS,
    HORIZON_STEPS,
    Call,
    call_of,
    class_means,
    decode_s,
    first_token_s,
    load_of,
    mean_step_s,
)
from tests.sim_builders import PLAIN
from tests.unit.sim.rival_routers.fleet import FREE, LIMITS, LOOSE, TIGHT, calls, fleet


def test_waiting_prompts_and_decodes_are_told_apart() -> None:
    load = calls((300, TIGHT), (500, LOOSE), (400, FREE))
    _, (decoding,) = fleet(load, [[0, 1]])
    _, (waiting,) = fleet(load, [[0, 1]], decoding=False)
    assert (load_of(decoding).count, load_of(decoding).prompt_tokens, load_of(decoding).kv_tokens) == (2, 0, 802)
    assert (load_of(waiting).count, load_of(waiting).prompt_tokens, load_of(waiting).kv_tokens) == (2, 800, 800)
    assert load_of(decoding).like(0.02) == load_of(decoding).like(0.1) == 1
    assert load_of(decoding).like(np.inf) == 0


def test_a_call_that_the_policy_has_not_seen_counts() -> None:
    load = calls((300, TIGHT), (500, LOOSE))
    recording = Recording.of(load.bound(PLAIN))
    replica = Replica(0, VllmOrder(), PLAIN, LIMITS, recording, ReplicaSettings(plan_ahead=True))
    replica.add(0, 0.0)
    replica.start_step(0.0)
    replica.add(1, 0.0)  # while a step executes
    assert load_of(replica).count == 2
    assert load_of(replica).prompt_tokens == 800


def test_paces_are_those_promised_not_those_a_planner_makes_of_deadlines() -> None:
    """Our planner writes a pace of 0 for a lost complete answer; a router that divided by it ended the run."""
    _, (replica,) = fleet(calls((300, FREE), (500, LOOSE)), [[0, 1]])
    replica.view.table.rows["tpot_s"][replica.slots] = 0.0
    assert sorted(load_of(replica).tpots_s.tolist()) == [0.1, np.inf]


def test_answers_are_the_mean_of_the_class() -> None:
    load = calls((300, TIGHT), (300, LOOSE), (300, LOOSE))
    load.calls["output_tokens"] = [10, 20, 40]
    recording, (replica,) = fleet(load, [[]])
    assert class_means(recording).tolist() == [10.0, 30.0, 0.0]
    assert call_of(recording, 1, replica, class_means(recording)) == Call(300, 30.0, 1.0, 0.1)


def test_steps_are_those_of_the_model() -> None:
    _, (replica,) = fleet(calls(*[(100, TIGHT)] * 9), [list(range(9))])
    load, call = load_of(replica), Call(1024, 50.0, 1.0, 0.1)
    chunk_s = 1e-4 * (CHUNK_TOKENS - 1)
    assert decode_s(PLAIN, load, call) == pytest.approx(0.011)
    assert mean_step_s(PLAIN, load, call) == pytest.approx(0.011 + 2 / HORIZON_STEPS * chunk_s)
    assert first_token_s(PLAIN, load, call) == pytest.approx(2 * (0.011 + chunk_s))
