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

    def key(self) -> str:
        """Text that names the question."""
        fields = asdict(self)
        fields["parameters"] = sorted(self.parameters.items())
        fields["conditions"] = sorted(fields["conditions"].items())
        fields["rate_rps"] = f"{self.rate_rps:.9g}"
        return repr(sorted(fields.items()))

    def at(self, rate_rps: float, seed: int, stop_below: float = 0.0) -> Question:
        """The same question at another rate, with another seed."""
        return replace(self, rate_rps=rate_rps, seed=seed, stop_below=stop_below)


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
    def of(cls, outcome: Outcome, stopped_early: bool, bound: float = 1.0) -> Answer:
        """From the summary of a run; ``bound`` is the attainment that was possible when it was cut short."""
        free = outcome.unpromised
        return cls(
            attainment=min(outcome.attainment, bound) if stopped_early else outcome.attainment,
            strict=min(outcome.strict, bound) if stopped_early else outcome.strict,
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
            stopped_early=stopped_early,
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
    stop = EarlyStop(measured, question.stop_below) if question.stop_below else None
    recording = run_question(question, stop)
    outcome = summarize_run(recording, measured)
    return Answer.of(outcome, recording.stopped_early, stop.bound if stop else 1.0)


class EarlyStop:
    """Ends a run once too many first tokens are late for the attainment to reach a level.

    Attributes:
        bound: attainment that was still possible when last asked.
    """

    def __init__(self, measured: NDArray[np.bool_], level: float) -> None:
        self._measured = measured
        self._level = level
        self.bound = 1.0

    def __call__(self, recording: Recording, now_s: float) -> bool:
        """Whether the level is out of reach at ``now_s``."""
        calls, sent_s = recording.workload.calls, recording.calls["arrival_s"]
        first_s = recording.token_s[recording.token_start]
        with np.errstate(invalid="ignore"):
            waited_s = np.where(np.isnan(first_s), now_s - sent_s, first_s)
            late = (waited_s > calls["ttft_s"] * (1.0 + 1e-6) + 1e-6) | recording.rejected
        missed = np.zeros(len(self._measured), dtype=np.bool_)
        missed[calls["session"][late]] = True
        self.bound = 1.0 - float(missed[self._measured].mean())
        return self.bound < self._level
