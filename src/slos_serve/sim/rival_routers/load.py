"""What a replica has to do, and how long its steps would take with one more call: what the rival routers judge by.

Steps are projected over :data:`HORIZON_STEPS` of them, as FluidServe does: all decodes run in each, and the prompts
that wait are computed in chunks spread over the horizon. Answers are taken for as long as the mean of their class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.policies.queue_order import tokens_left_of
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica

HORIZON_STEPS = 100
CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Call:
    """A call as a router sees it.

    Attributes:
        prompt_tokens: to compute, without what the replica's cache supplies.
        answer_tokens: expected, the mean of its class.
        ttft_s, tpot_s: promised; inf without a promise.
    """

    prompt_tokens: int
    answer_tokens: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica holds, waiting requests counted.

    Attributes:
        count: requests.
        prompt_tokens: prompt tokens to compute.
        kv_tokens: tokens of the requests' KV once their prompts are computed.
        tpots_s: float64 [count], promised paces; inf without one.
    """

    count: int
    prompt_tokens: int
    kv_tokens: int
    tpots_s: NDArray[np.float64]

    def like(self, tpot_s: float) -> int:
        """How many of the requests have the same pace."""
        return int((self.tpots_s == tpot_s).sum())


def load_of(replica: Replica) -> Load:
    """The load of a replica now."""
    slots, rows = replica.slots, replica.view.table.rows
    left = tokens_left_of(rows, slots)
    kv_tokens = int((rows["prompt_tokens"][slots] + rows["output_tokens"][slots]).sum())
    tpots_s = np.asarray(rows["promised_tpot_s"][slots], dtype=np.float64)
    return Load(len(slots), int(left[left > 1].sum()), kv_tokens, tpots_s)


def class_means(recording: Recording) -> NDArray[np.float64]:
    """float64 [classes]: mean answer of each class in the workload, which is what the papers profile beforehand."""
    calls, count = recording.workload.calls, len(recording.workload.classes)
    total = np.bincount(calls["class_index"], weights=calls["output_tokens"], minlength=count)
    return np.asarray(total / np.maximum(np.bincount(calls["class_index"], minlength=count), 1))


def call_of(recording: Recording, call: int, replica: Replica, means: NDArray[np.float64]) -> Call:
    """A call on its way to a replica."""
    row = recording.workload.calls[call]
    new_tokens = int(row["prompt_tokens"]) - replica.cached_tokens(call)
    return Call(new_tokens, float(means[row["class_index"]]), float(row["ttft_s"]), float(row["tpot_s"]))


def decode_s(model: BatchTimeModel, load: Load, call: Call) -> float:
    """A step that decodes everything the replica would hold, the call grown to half of its answer."""
    kv_tokens = load.kv_tokens + call.prompt_tokens + round(call.answer_tokens / 2)
    return model.step_s(BatchShape(load.count + 1, kv_tokens, 0, load.count + 1))


def mean_step_s(model: BatchTimeModel, load: Load, call: Call) -> float:
    """Mean step over the horizon, with the call."""
    chunks = (load.prompt_tokens + call.prompt_tokens) / CHUNK_TOKENS
    chunk_s = model.step_s(BatchShape(CHUNK_TOKENS, 0, CHUNK_TOKENS**2)) - model.step_s(BatchShape(1))
    return decode_s(model, load, call) + min(chunks / HORIZON_STEPS, 1.0) * chunk_s


def first_token_s(model: BatchTimeModel, load: Load, call: Call) -> float:
    """Seconds until the call's first token: the prompts before it, and its own, in chunks beside the decodes."""
    tokens = load.prompt_tokens + call.prompt_tokens
    chunk_s = model.step_s(BatchShape(CHUNK_TOKENS, 0, CHUNK_TOKENS**2)) - model.step_s(BatchShape(1))
    chunks = tokens / CHUNK_TOKENS
    return chunks * chunk_s + max(chunks, 1.0) * decode_s(model, load, call)
