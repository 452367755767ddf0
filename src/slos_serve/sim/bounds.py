"""What no scheduler can beat: a fluid bound on the rate, and a clairvoyant bound on attainment over one trace.

Fluid (docs/simulator.md): steps of length T <= the tightest TPOT carry ``rate * T`` arrivals' prefill and one token of
every decode; the batch must end within T and the mean KV must fit. Work that speculation saves or adds is counted with
the expected number of accepted tokens. Clairvoyant: a linear program that knows every arrival and length and may serve
fractions of requests in any order; it relaxes every rule of an engine but its speed and its memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.formula import K_C, K_CTX, K_M, K_Q, K_SEQ
from slos_serve.perf.step_time import roofline_tokens
from slos_serve.sim.limits import EngineLimits
from slos_serve.workload.calls import Workload
from slos_serve.workload.prefixes import cached_at_best

Floats = NDArray[np.float64]
MAX_DRAFT = 10
NUM_STEP_LENGTHS = 200
# OPT-125M-like draft: 12 layers of launch-bound kernels (about 0.5 ms) and 0.25 GB of weights read (0.2 ms).
DRAFT_STEP_S = 0.7e-3


@dataclass(frozen=True)
class Work:
    """What each request asks of an engine, float64 [requests]; rounds of a session added up.

    Attributes:
        prefill_tokens: prompt tokens that no prefix cache supplies.
        decode_tokens: output tokens after the first of each call.
        prefill_quad, prefill_context: attention work of the prompts.
        decode_context: KV tokens read by all decode steps of the request, one token a step.
        tpot_s: tightest TPOT of the request.
    """

    prefill_tokens: Floats
    decode_tokens: Floats
    prefill_quad: Floats
    prefill_context: Floats
    decode_context: Floats
    tpot_s: Floats

    def subset(self, keep: NDArray[np.bool_]) -> Work:
        """Work of some of the requests."""
        return Work(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))


def work_of(workload: Workload, block_size: int = 16, prefix_cache: bool = True) -> Work:
    """Work of every request of a bound workload (see :meth:`Workload.bound`)."""
    calls = workload.calls
    cached = np.zeros(len(calls), dtype=np.int64)
    if prefix_cache:
        cached = cached_at_best(workload.prefixes, calls["prompt_tokens"], block_size)
    new = (calls["prompt_tokens"] - cached).astype(np.float64)
    decodes = (calls["output_tokens"] - 1).astype(np.float64)
    context = decodes * (calls["prompt_tokens"] + 0.5 * calls["output_tokens"])
    session, count = calls["session"], workload.num_requests
    tpot = np.full(count, np.inf)
    np.minimum.at(tpot, session, np.minimum(calls["tpot_s"], calls["next_tpot_s"]))

    def total(values: NDArray[np.floating]) -> Floats:
        return np.asarray(np.bincount(session, weights=values, minlength=count), dtype=np.float64)

    quad = new * (new + 2.0 * cached)
    return Work(total(new), total(decodes), total(quad), total(1.0 * cached), total(context), tpot)


def fluid_bound(
    work: Work,
    model: BatchTimeModel,
    limits: EngineLimits,
    acceptance: float | None = None,
    draft_step_s: float = DRAFT_STEP_S,
) -> float:
    """Highest sustainable requests/s of one replica that serves all requests.

    Args:
        work: of a large sample of requests.
        acceptance: of a draft token; ``None`` for no speculation.
        draft_step_s: seconds of a sequential draft step.
    """
    tightest_s = float(work.tpot_s.min())
    lengths = (0,) if acceptance is None else tuple(range(MAX_DRAFT + 1))
    best = 0.0
    for draft in lengths:
        accepted = _accepted(acceptance or 0.0, draft)
        longest_s = min(tightest_s * accepted, 60.0)
        for step_s in np.linspace(longest_s / NUM_STEP_LENGTHS, longest_s, NUM_STEP_LENGTHS):
            best = max(best, _rate(work, model, limits, float(step_s), draft, accepted, draft_step_s))
    return best


def cheapest_share_bound(work: Work, model: BatchTimeModel, limits: EngineLimits, share: float = 0.9) -> float:
    """Rate at which only the cheapest ``share`` of requests are served, the costliest dropped for free."""
    k_c, _, _, _, k_ctx, k_q, _, _ = model.coefficients
    cost = k_c * (work.prefill_tokens + work.decode_tokens) + k_q * work.prefill_quad + k_ctx * work.decode_context
    keep = cost <= np.quantile(cost, share)
    return fluid_bound(work.subset(keep), model, limits) / float(keep.mean())


def _accepted(acceptance: float, draft: int) -> float:
    """Tokens that one verification of ``draft`` draft tokens yields on average."""
    return float(sum(acceptance**k for k in range(draft + 1)))


def _rate(
    work: Work,
    model: BatchTimeModel,
    limits: EngineLimits,
    step_s: float,
    draft: int,
    accepted: float,
    draft_step_s: float,
) -> float:
    steps = float(work.decode_tokens.mean()) / accepted  # verifications a request
    tokens = float(work.prefill_tokens.mean()) + steps * (draft + 1)
    context = float(work.decode_context.mean()) / accepted
    # A batch of one request a second and step: the roofline's slopes then are those of a request.
    coefficients = model.coefficients
    read = context + float(work.prefill_context.mean())
    other_s = coefficients[K_CTX] * read + coefficients[K_Q] * float(work.prefill_quad.mean())
    other_s += coefficients[K_SEQ] * steps * (draft + 1)
    coefficients[[K_C, K_M]] = step_s * (coefficients[[K_C, K_M]] * tokens + other_s)
    by_time = roofline_tokens(coefficients, step_s - draft * draft_step_s, np.inf)
    by_memory = limits.kv_capacity_tokens / max(step_s * context, 1e-9)
    return float(max(min(by_time, by_memory), 0.0))


def clairvoyant_attainment(
    workload: Workload, model: BatchTimeModel, limits: EngineLimits, replicas: int = 1, slot_s: float = 1.0
) -> float:
    """Upper bound on the share of requests that attain; ``workload`` bound, one call a request.

    In slots of time, fractions of requests are served between arrival and last due time: compute seconds and KV
    token-seconds of a slot are limited. Steps are as long as the tightest TPOT allows: some decode is always running.
    """
    calls = workload.calls
    work = work_of(workload, limits.block_size)
    k_c, b_c, k_m, b_m, k_ctx, k_q, _, _ = model.coefficients
    tokens = work.prefill_tokens + work.decode_tokens
    other_s = k_q * work.prefill_quad + k_ctx * work.decode_context
    kv_token_s = work.decode_context * max(b_m, b_c)  # no decode step is shorter than its constant
    begin = calls["arrival_s"]
    end = begin + calls["ttft_s"] + calls["output_tokens"] * np.maximum(calls["tpot_s"], calls["next_tpot_s"])
    first, last = (begin / slot_s).astype(np.int64), np.ceil(end / slot_s).astype(np.int64)
    spans = np.maximum(last - first, 1)
    owner = np.repeat(np.arange(len(calls)), spans)
    slot = np.arange(len(owner)) - np.repeat(np.cumsum(spans) - spans, spans) + first[owner]
    count, parts, num_slots = len(calls), len(owner), int(slot.max()) + 1
    # Variables: share x of each request, its compute parts y and its memory parts z over the slots. A batch takes at
    # least what either branch of the model says, so both limit the compute parts of a slot.
    y, z = count + np.arange(parts), count + parts + np.arange(parts)
    rows = np.concatenate((slot, num_slots + slot, 2 * num_slots + slot))
    columns = np.concatenate((y, y, z))
    values = np.concatenate(((k_c * tokens + other_s)[owner], (k_m * tokens + other_s)[owner], kv_token_s[owner]))
    limit = csr_matrix((values, (rows, columns)), shape=(3 * num_slots, count + 2 * parts))
    tightest_s = float(work.tpot_s.min())
    branches = [np.full(num_slots, replicas * slot_s * max(1.0 - b / tightest_s, 1e-6)) for b in (b_c, b_m)]
    memory = np.full(num_slots, replicas * slot_s * float(limits.kv_capacity_tokens))
    room = np.concatenate((*branches, memory))
    columns = np.concatenate((y, z))
    ties = csr_matrix(
        (
            np.concatenate((np.ones(2 * parts), -np.ones(2 * count))),
            (
                np.concatenate((owner, count + owner, np.arange(2 * count))),
                np.concatenate((columns, np.tile(np.arange(count), 2))),
            ),
        ),
        shape=(2 * count, count + 2 * parts),
    )
    gain = np.concatenate((-np.ones(count), np.zeros(2 * parts)))
    top = np.concatenate((np.ones(count), np.full(2 * parts, np.inf)))
    rules = [LinearConstraint(limit, ub=room), LinearConstraint(ties, lb=0.0, ub=0.0)]
    result = milp(gain, constraints=rules, bounds=Bounds(np.zeros_like(top), top))  # no integers: HiGHS solves an LP
    return float(-result.fun / count) if result.success else 1.0
