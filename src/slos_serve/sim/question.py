"""One simulation as a question and an answer: what a result depends on, and what tables show of it.

Equal questions have equal answers, so answers can be kept on disk. A run may end early when its attainment can no
longer reach what was asked; its answer then says so and is only an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slos_serve.sim.conditions import AS_SERVED, Conditions
from slos_serve.sim.drafters import NO_DRAFTER, with_drafter
from slos_serve.sim.early_stop import EarlyStop
from slos_serve.sim.engine import KV_TRANSFER_BYTES_PER_S, SimSettings, simulate
from slos_serve.sim.outcome import Outcome, summarize_run
from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
from slos_serve.sim.recording import Recording
from slos_serve.workload.scenarios import make_workload

WARM_UP_SHARE, COOL_DOWN_SHARE = 0.10, 0.05


@dataclass(frozen=True)
class Question:
    """One simulation: what a result depends on, and nothing else."""

    scenario: str
    policy: str
    parameters: Mapping[str, Any]
    profile: str
    arrivals: str
    rate_rps: float
    num_requests: int
    seed: int
    replicas: int = 1
    prefill_replicas: int = 0
    moving_roles: bool = False
    transfer_bytes_per_s: float = KV_TRANSFER_BYTES_PER_S
    router: str = "least-loaded"
    oracle_lengths: bool = False
    acceptance: float = 0.7
    drafter: str = NO_DRAFTER
    conditions: Conditions = AS_SERVED
    stop_below: float = 0.0
    stop_metric: str = "attainment"

    def key(self) -> str:
        """Text that names the question."""
        fields = asdict(self)
        fields["parameters"] = sorted(self.parameters.items())
        fields["conditions"] = sorted(fields["conditions"].items())
        fields["rate_rps"] = f"{self.rate_rps:.9g}"
        return repr(sorted(fields.items()))

    def at(self, rate_rps: float, seed: int, stop_below: float = 0.0, stop_metric: str = "attainment") -> Question:
        """The same question at another rate, with another seed."""
        return replace(self, rate_rps=rate_rps, seed=seed, stop_below=stop_below, stop_metric=stop_metric)


@dataclass(frozen=True)
class Answer:
    """What a simulation found; see :class:`slos_serve.sim.outcome.Outcome` for the terms.

    Attributes:
        attainment: share of the measured requests that attained; only an upper bound when ``stopped_early``.
        strict: share with every token in time; likewise.
        admitted_attained: share of the admitted ones that attained; ``None`` for a policy that admits nobody.
        by_prompt_quartile, strict_by_prompt_quartile, by_class, strict_by_class: shares.
        tokens_per_s, goodput_tokens_per_s: output tokens of all, and of requests that attained.
        recomputed: share of the computed tokens that were computed again after a preemption.
        unpromised_ttft_ms, unpromised_last_ms: p50 and p99 of the calls without a promise.
        steps: engine steps simulated.
        stopped_early: the run was cut short.
    """

    attainment: float
    strict: float
    admitted_attained: float | None = None
    by_prompt_quartile: tuple[float, ...] = ()
    strict_by_prompt_quartile: tuple[float, ...] = ()
    by_class: Mapping[str, float] | None = None
    strict_by_class: Mapping[str, float] | None = None
    tokens_per_s: float = 0.0
    goodput_tokens_per_s: float = 0.0
    recomputed: float = 0.0
    unpromised_ttft_ms: tuple[float | None, float | None] = (None, None)
    unpromised_last_ms: tuple[float | None, float | None] = (None, None)
    steps: int = 0
    stopped_early: bool = False

    @classmethod
    def of(cls, outcome: Outcome, stop: EarlyStop | None = None) -> Answer:
        """From the summary of a run, and from what cut it short, if anything did."""
        free = outcome.unpromised
        return cls(
            attainment=stop.attainment if stop is not None else outcome.attainment,
            strict=stop.strict if stop is not None else outcome.strict,
            admitted_attained=outcome.admitted_attained / outcome.admitted if outcome.admitted else None,
            by_prompt_quartile=tuple(outcome.by_prompt_quartile),
            strict_by_prompt_quartile=tuple(outcome.strict_by_prompt_quartile),
            by_class=outcome.by_class,
            strict_by_class=outcome.strict_by_class,
            tokens_per_s=outcome.output_tokens_per_s,
            goodput_tokens_per_s=outcome.goodput_tokens_per_s,
            recomputed=outcome.recomputed,
            unpromised_ttft_ms=(free.ttft_ms.p50, free.ttft_ms.p99),
            unpromised_last_ms=(free.last_token_ms.p50, free.last_token_ms.p99),
            steps=outcome.steps,
            stopped_early=stop is not None,
        )

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Answer:
        """From what ``asdict`` and JSON made of it."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
        }
        return cls(**fields)


def measured_part(num_requests: int) -> NDArray[np.bool_]:
    """bool [num_requests]: the requests of a run that count, without its warm-up and its end."""
    measured = np.zeros(num_requests, dtype=np.bool_)
    begin, end = int(WARM_UP_SHARE * num_requests), int((1.0 - COOL_DOWN_SHARE) * num_requests)
    measured[begin : max(end, begin + 1)] = True
    return measured


def run_question(question: Question, stop: EarlyStop | None = None) -> Recording:
    """Simulate what a question asks."""
    profile = with_drafter(find_profile(question.profile), question.drafter)
    workload = make_workload(
        question.scenario,
        question.rate_rps,
        question.num_requests,
        question.seed,
        question.arrivals,
        question.acceptance,
    )
    settings = SimSettings(
        policy=question.policy,
        parameters=question.parameters,
        replicas=question.replicas,
        prefill_replicas=question.prefill_replicas,
        moving_roles=question.moving_roles,
        transfer_bytes_per_s=question.transfer_bytes_per_s,
        router=question.router,
        oracle_lengths=question.oracle_lengths,
        kv_bytes_per_token=kv_bytes_per_token(profile),
        seed=question.seed,
        drafter=question.drafter,
    )
    return simulate(workload, profile.model, limits_of(profile), question.conditions.on(settings), stop)


def answer(question: Question) -> Answer:
    """Run one simulation."""
    measured = measured_part(question.num_requests)
    stop = EarlyStop(measured, question.stop_below, question.stop_metric) if question.stop_below else None
    recording = run_question(question, stop)
    outcome = summarize_run(recording, measured)
    return Answer.of(outcome, stop if recording.stopped_early else None)
