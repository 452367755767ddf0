"""Replicas that hold given calls, and a router's choice among them."""

from __future__ import annotations

from collections.abc import Sequence

from slos_serve.core.slo import SLO, SLOClass, single_stage
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.policies.vllm_order import VllmOrder
from slos_serve.sim.limits import EngineLimits, ReplicaSettings
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.workload.calls import Workload
from tests.sim_builders import PLAIN, workload

TIGHT = single_stage("tight", SLO(ttft_ms=1000.0, tpot_ms=20.0))
LOOSE = single_stage("loose", SLO(ttft_ms=1000.0, tpot_ms=100.0))
FREE = single_stage("free", SLO())
LIMITS = EngineLimits(kv_capacity_tokens=100_000)


def calls(*asked: tuple[int, SLOClass], answer: int = 100) -> Workload:
    """One call for each (prompt tokens, class)."""
    classes = (TIGHT, LOOSE, FREE)
    kinds = [classes.index(kind) for _, kind in asked]
    prompts = [tokens for tokens, _ in asked]
    return workload([0.0] * len(asked), prompts, [answer] * len(asked), classes, kinds)


def fleet(
    load: Workload, held: Sequence[Sequence[int]], model: BatchTimeModel = PLAIN, decoding: bool = True
) -> tuple[Recording, list[Replica]]:
    """Replicas with these calls on them: all in their decodes, or all waiting."""
    recording = Recording.of(load.bound(model))
    replicas = []
    for index, own in enumerate(held):
        replica = Replica(index, VllmOrder(16_384), model, LIMITS, recording, ReplicaSettings())
        for call in own:
            replica.add(call, 0.0)
        if decoding and own:
            end_s = replica.start_step(0.0)
            assert end_s is not None
            replica.finish_step(end_s)
        replicas.append(replica)
    return recording, replicas
