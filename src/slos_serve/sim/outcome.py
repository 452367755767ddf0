"""Reads a recording: scores of calls and requests, and the summary that commands print and write."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from slos_serve.metrics.bulk import CallScores, CallTargets, attained_by_quartile, requests_attained, score_calls
from slos_serve.metrics.summary import Quantiles, quantiles_ms, wilson_interval
from slos_serve.sim.recording import Recording
from slos_serve.sim.tasks import call_targets_s


@dataclass(frozen=True)
class Unpromised:
    """Calls to which no promise was made; with a policy that promises nothing, all of them.

    Attributes:
        calls, rejected: counts; a rejected call got no token.
        ttft_ms, last_token_ms: from arrival to the first and to the last token, p50 and p99 of those that completed.
    """

    calls: int
    rejected: int
    ttft_ms: Quantiles
    last_token_ms: Quantiles


@dataclass(frozen=True)
class Outcome:
    """A run in numbers; counts are of requests (sessions), times of completed calls.

    Attributes:
        requests, attained, admitted, admitted_attained, rejected, unfinished: counts; of the first promise of a class.
        second_best, second_best_attained: requests that were made a weaker promise of their class, and that kept it.
        attainment, low, high: share attained and its Wilson 95 % interval.
        strict: share whose every token was in time.
        by_class, strict_by_class: class -> share of its calls that attained, and with every token in time.
        by_prompt_quartile, strict_by_prompt_quartile: the same by quartile of the first prompt's length, short to long.
        unpromised: how calls without a promise fared.
        ttft_ms, tpot_ms: p50 and p99.
        demoted: requests whose promise was taken back.
        steps, preemptions, empty_plans: counts over all replicas.
        duration_s: virtual time.
        output_tokens_per_s: tokens of completed calls over virtual time.
        goodput_tokens_per_s: of them, those of requests that attained.
        recomputed: share of all computed tokens that were computed again after a preemption.
    """

    requests: int
    attained: int
    admitted: int
    admitted_attained: int
    second_best: int
    second_best_attained: int
    demoted: int
    rejected: int
    unfinished: int
    attainment: float
    low: float
    high: float
    strict: float
    by_class: dict[str, float]
    strict_by_class: dict[str, float]
    by_prompt_quartile: list[float]
    strict_by_prompt_quartile: list[float]
    unpromised: Unpromised
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    steps: int
    preemptions: int
    empty_plans: int
    duration_s: float
    output_tokens_per_s: float
    goodput_tokens_per_s: float
    recomputed: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def score(recording: Recording) -> CallScores:
    """Scores of every call, held to the first promise of its class."""
    calls = recording.workload.calls
    names = ("ttft_s", "tpot_s", "next_tpot_s", "e2e_s")
    return _score(recording, *(np.ascontiguousarray(calls[name]) for name in names))


def score_given(recording: Recording) -> CallScores:
    """Scores of every call, held to the promise that it asked for last."""
    calls = recording.workload.calls
    ttft_s, tpot_s, next_tpot_s, e2e_s = (calls[name].copy() for name in ("ttft_s", "tpot_s", "next_tpot_s", "e2e_s"))
    for call, promise in recording.weaker.items():
        ttft_s[call], tpot_s[call], e2e_s[call] = promise
        next_tpot_s[call] = promise[1]
    return _score(recording, ttft_s, tpot_s, next_tpot_s, e2e_s)


def _score(recording: Recording, *targets: NDArray[np.float64]) -> CallScores:
    calls = recording.workload.calls
    ttft_s, tpot_s, next_tpot_s, e2e_s = targets
    e2e_s = np.minimum(e2e_s, call_targets_s(recording))
    promised = CallTargets(ttft_s, tpot_s, next_tpot_s, e2e_s, np.ascontiguousarray(calls["first_stage_tokens"]))
    outputs = np.ascontiguousarray(calls["output_tokens"])
    return score_calls(recording.token_s, recording.token_start, outputs, recording.completed, promised)


def summarize_run(recording: Recording, measured: NDArray[np.bool_] | None = None) -> Outcome:
    """Summary of the requests in ``measured`` (bool [requests], all by default)."""
    calls, scores = recording.workload.calls, score(recording)
    count = recording.workload.num_requests
    session = np.ascontiguousarray(calls["session"])
    chosen = np.ones(count, dtype=np.bool_) if measured is None else measured
    attained = requests_attained(scores.attained, session, count)
    strict = requests_attained(scores.strict, session, count)
    promised, weaker = recording.calls["admitted"] == 1, recording.calls["rank"] > 0
    admitted = requests_attained(promised & ~weaker, session, count)
    second_best = requests_attained(promised, session, count) & ~requests_attained(~weaker, session, count)
    kept = requests_attained(score_given(recording).attained, session, count) if weaker.any() else attained
    finished = requests_attained(scores.completed, session, count)
    rejected = ~requests_attained(~recording.rejected, session, count)
    demoted = ~requests_attained(recording.calls["demoted"] == 0, session, count)
    done = scores.completed & chosen[session]
    first_call = np.flatnonzero(np.isfinite(calls["arrival_s"]))
    order = np.argsort(session[first_call])
    prompts = np.ascontiguousarray(calls["prompt_tokens"][first_call[order]])
    low, high = wilson_interval(int(attained[chosen].sum()), int(chosen.sum()))
    return Outcome(
        requests=int(chosen.sum()),
        attained=int(attained[chosen].sum()),
        admitted=int(admitted[chosen].sum()),
        admitted_attained=int((admitted & attained)[chosen].sum()),
        second_best=int(second_best[chosen].sum()),
        second_best_attained=int((second_best & kept)[chosen].sum()),
        demoted=int(demoted[chosen].sum()),
        rejected=int(rejected[chosen].sum()),
        unfinished=int((~finished & ~rejected)[chosen].sum()),
        attainment=float(attained[chosen].mean()) if chosen.any() else float("nan"),
        low=low,
        high=high,
        strict=float(strict[chosen].mean()) if chosen.any() else float("nan"),
        by_class=_by_class(recording, scores.attained, chosen[session]),
        strict_by_class=_by_class(recording, scores.strict, chosen[session]),
        by_prompt_quartile=attained_by_quartile(attained[chosen], prompts[chosen]),
        strict_by_prompt_quartile=attained_by_quartile(strict[chosen], prompts[chosen]),
        unpromised=_unpromised(recording, scores, chosen[session]),
        ttft_ms=quantiles_ms(scores.ttft_s[done]),
        tpot_ms=quantiles_ms(scores.tpot_s[done]),
        steps=recording.num_steps,
        preemptions=recording.num_preemptions,
        empty_plans=recording.num_empty_plans,
        duration_s=recording.end_s,
        output_tokens_per_s=float(calls["output_tokens"][done].sum()) / max(recording.end_s, 1e-9),
        goodput_tokens_per_s=float(calls["output_tokens"][done & attained[session]].sum()) / max(recording.end_s, 1e-9),
        recomputed=recording.num_recomputed / max(int(recording.steps.rows["new_tokens"].sum()), 1),
    )


def _unpromised(recording: Recording, scores: CallScores, chosen: NDArray[np.bool_]) -> Unpromised:
    records = recording.calls
    came = chosen & np.isfinite(records["arrival_s"]) & (records["admitted"] == 0)
    done = came & scores.completed
    return Unpromised(
        calls=int(came.sum()),
        rejected=int((came & recording.rejected).sum()),
        ttft_ms=quantiles_ms(scores.ttft_s[done]),
        last_token_ms=quantiles_ms((records["done_s"] - records["arrival_s"])[done]),
    )


def _by_class(recording: Recording, met: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> dict[str, float]:
    class_index = recording.workload.calls["class_index"]
    rates = {}
    for index, slo_class in enumerate(recording.workload.classes):
        own = (class_index == index) & chosen
        if own.any():
            rates[slo_class.name] = float(met[own].mean())
    return rates
