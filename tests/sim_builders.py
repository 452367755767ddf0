"""Small workloads and replicas for tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slos_serve.core.slo import SLO, SLOClass, single_stage
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.recording import Recording
from slos_serve.workload.calls import Workload, empty_calls

# A step of n tokens takes 10 ms + 0.1 ms * n, whatever its context: easy to work out by hand.
PLAIN = BatchTimeModel(k_c_s=1e-4, b_c_s=0.010, k_m_s=1e-4, b_m_s=0.010)
# With context and attention terms, and a memory-bound floor, as a GPU has.
GPU = BatchTimeModel(k_c_s=1e-4, b_c_s=0.018, k_m_s=5e-5, b_m_s=0.020, k_ctx_s=6e-7, k_q_s=7e-9)
CHAT = single_stage("chat", SLO(ttft_ms=1000.0, tpot_ms=100.0))
LIMITS = EngineLimits(kv_capacity_tokens=16 * 1000, max_num_batched_tokens=8192)


def workload(
    arrivals_s: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    classes: tuple[SLOClass, ...] = (CHAT,),
    class_index: Sequence[int] | None = None,
) -> Workload:
    """One call a request."""
    calls = empty_calls(len(arrivals_s))
    calls["arrival_s"], calls["prompt_tokens"] = arrivals_s, prompts
    calls["output_tokens"] = calls["first_stage_tokens"] = outputs
    calls["max_tokens"] = np.maximum(calls["output_tokens"], 512)
    calls["class_index"] = 0 if class_index is None else class_index
    return Workload("test", classes, calls)


def run(
    load: Workload,
    policy: str = "vllm",
    model: BatchTimeModel = PLAIN,
    limits: EngineLimits = LIMITS,
    **settings: object,
) -> Recording:
    """Simulate with a policy's default parameters."""
    return simulate(load, model, limits, SimSettings(policy=policy, **settings))  # type: ignore[arg-type]  # by name


def token_times(recording: Recording, call: int) -> list[float]:
    """Token times of a call after its arrival, rounded to the microsecond."""
    first = int(recording.token_start[call])
    count = int(recording.workload.calls["output_tokens"][call])
    return [round(float(value), 6) for value in recording.token_s[first : first + count]]
