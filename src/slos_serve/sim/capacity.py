"""Capacity: the highest rate per GPU at which a target share of requests attains, with a confidence interval.

The same seeded requests come at every rate (common random numbers), so attainment falls smoothly with the rate. A
search brackets the crossing, then bisects. Parameters of a policy are compared on one seed first; the best of them is
then searched with all seeds, and each seed's own crossing gives the interval. Searches are generators that ask for
evaluations and get results: whoever drives them decides on processes, caching and progress.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slos_serve.policies.registry import policy_entry
from slos_serve.sim.bounds import DRAFT_STEP_S, Work, fluid_bound, work_of
from slos_serve.sim.drafters import NO_DRAFTER, with_drafter
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.model_error import ModelError
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
from slos_serve.sim.recording import Recording
from slos_serve.workload.scenarios import make_workload

WARM_UP_SHARE, COOL_DOWN_SHARE = 0.10, 0.05
# A run stops when this much below the target is certain: its exact value would not matter.
STOP_MARGIN = 0.10
# Fixed draft lengths that a policy without its own is tried with, on the best of its other parameters.
FIXED_DRAFTS = (2, 4)
COARSE_STEP, FINE_TOLERANCE = 1.3, 0.02
MAX_BRACKET_STEPS = 14
# Student's t at 97.5 %, by degrees of freedom.
_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


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
    prefill_replicas: int = 1
    router: str = "least-loaded"
    oracle_lengths: bool = False
    acceptance: float = 0.7
    drafter: str = NO_DRAFTER
    bias: float = 1.0
    noise: float = 0.0
    stop_below: float = 0.0

    def key(self) -> str:
        """Text that names the question."""
        fields = asdict(self)
        fields["parameters"] = sorted(self.parameters.items())
        fields["rate_rps"] = f"{self.rate_rps:.9g}"
        return repr(sorted(fields.items()))


@dataclass(frozen=True)
class Answer:
    """What a simulation found.

    Attributes:
        attainment: share of the measured requests that attained; only an upper bound when ``stopped_early``.
        admitted_attained: share of the admitted ones that did; ``None`` for a policy that admits nobody.
        by_prompt_quartile: attainment by quartile of prompt length.
        strict: share with every token in time.
        steps: engine steps simulated.
    """

    attainment: float
    admitted_attained: float | None
    by_prompt_quartile: list[float]
    strict: float
    steps: int
    stopped_early: bool


@dataclass(frozen=True)
class Capacity:
    """Result of a search.

    Attributes:
        capacity_rps_per_gpu: highest rate with the target attainment, over GPUs.
        ci: 95 % interval from the seeds' own crossings.
        attainment: at that rate, interpolated between the rates tried.
        parameters: the best ones tried.
        tried: capacity of every parameter set on the first seed.
        curve: (rate per GPU, attainment) of the best, rising rates.
        admitted_attained, by_prompt_quartile, strict: at the tried rate nearest to the capacity from below.
    """

    scenario: str
    policy: str
    replicas: int
    arrivals: str
    capacity_rps_per_gpu: float
    ci: tuple[float, float]
    attainment: float
    fluid_bound_rps_per_gpu: float
    fluid_bound_speculative_rps_per_gpu: float
    parameters: dict[str, Any]
    tried: list[dict[str, Any]]
    curve: list[tuple[float, float]]
    admitted_attained: float | None
    by_prompt_quartile: list[float]
    strict: float
    num_requests: int
    seeds: int
    oracle_lengths: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Search = Generator[list[Question], list[Answer], Capacity]
RateSearch = Generator[list[Question], list[Answer], list[tuple[float, list[Answer]]]]


def answer(question: Question) -> Answer:
    """Run one simulation."""
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
        router=question.router,
        oracle_lengths=question.oracle_lengths,
        error=ModelError(bias=question.bias, noise=question.noise),
        kv_bytes_per_token=kv_bytes_per_token(profile),
        seed=question.seed,
        drafter=question.drafter,
    )
    measured = np.zeros(workload.num_requests, dtype=np.bool_)
    begin, end = int(WARM_UP_SHARE * len(measured)), int((1.0 - COOL_DOWN_SHARE) * len(measured))
    measured[begin : max(end, begin + 1)] = True
    stop = EarlyStop(measured, question.stop_below)
    recording = simulate(workload, profile.model, limits_of(profile), settings, stop if question.stop_below else None)
    outcome = summarize_run(recording, measured)
    attainment = min(outcome.attainment, stop.bound) if recording.stopped_early else outcome.attainment
    return Answer(
        attainment=attainment,
        admitted_attained=outcome.admitted_attained / outcome.admitted if outcome.admitted else None,
        by_prompt_quartile=outcome.by_prompt_quartile,
        strict=outcome.strict,
        steps=outcome.steps,
        stopped_early=recording.stopped_early,
    )


class EarlyStop:
    """Ends a run once too many first tokens are late for the attainment to reach a level.

    Attributes:
        bound: attainment that was still possible when last asked.
    """

    def __init__(self, measured: np.ndarray[tuple[int], np.dtype[np.bool_]], level: float) -> None:
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


def search_capacity(base: Question, seeds: int, target: float = 0.9, variants: bool = True) -> Search:
    """Search one (scenario, policy): best parameters on one seed, then the crossing with all seeds.

    Args:
        base: everything but rate, seed and parameters.
        seeds: how many.
        target: attainment asked for.
        variants: try the policy's parameter sets; else only the one in ``base``.
    """
    work = bound_work(base)
    profile = find_profile(base.profile)
    fluid = fluid_bound(work, profile.model, limits_of(profile))
    drafting = with_drafter(profile, base.drafter)
    draft_step_s = drafting.model.k_s_s if base.drafter != NO_DRAFTER else DRAFT_STEP_S
    speculative = fluid_bound(work, drafting.model, limits_of(drafting), base.acceptance, draft_step_s)
    gpus = base.replicas * profile.tensor_parallel
    candidates = [base] if not variants else _candidates(base)
    lengths = FIXED_DRAFTS if variants and base.drafter != NO_DRAFTER and policy_entry(base.policy).fixed_drafts else ()
    tried: list[tuple[float, Question]] = []
    start = 0.6 * fluid * base.replicas
    if len(candidates) + len(lengths) > 1:
        for candidate in candidates:
            yield from _try(candidate, target, start, tried)
            start = max(tried[-1][0], 0.05 * fluid)
        _, best = max(tried, key=lambda pair: pair[0])
        for length in lengths:
            longer = Question(**{**_fields(best), "parameters": {**best.parameters, "draft_tokens": length}})
            yield from _try(longer, target, start, tried)
            start = max(tried[-1][0], 0.05 * fluid)
        best_rate, best = max(tried, key=lambda pair: pair[0])
        start = max(best_rate, 0.05 * fluid)
    else:
        best = candidates[0]
    found = yield from _rates(best, list(range(seeds)), start, target, FINE_TOLERANCE)
    crossing = _crossing(found, target, None)
    at = _nearest_below(found, crossing)
    return Capacity(
        scenario=base.scenario,
        policy=base.policy,
        replicas=base.replicas,
        arrivals=base.arrivals,
        capacity_rps_per_gpu=crossing / gpus,
        ci=_interval([_crossing(found, target, seed) / gpus for seed in range(seeds)], crossing / gpus),
        attainment=_attainment_at(found, crossing),
        fluid_bound_rps_per_gpu=fluid / profile.tensor_parallel,
        fluid_bound_speculative_rps_per_gpu=speculative / profile.tensor_parallel,
        parameters={**best.parameters, **_split_of(best)},
        tried=[
            {"parameters": {**question.parameters, **_split_of(question)}, "rps_per_gpu": rate / gpus}
            for rate, question in tried
        ],
        curve=[(rate / gpus, float(np.mean([one.attainment for one in answers]))) for rate, answers in found],
        admitted_attained=_mean([one.admitted_attained for one in at]),
        by_prompt_quartile=[float(x) for x in np.mean([one.by_prompt_quartile for one in at], axis=0)],
        strict=float(np.mean([one.strict for one in at])),
        num_requests=base.num_requests,
        seeds=seeds,
        oracle_lengths=base.oracle_lengths,
    )


def _try(
    candidate: Question, target: float, start: float, tried: list[tuple[float, Question]]
) -> Generator[list[Question], list[Answer], None]:
    """Add the crossing of one parameter set on the first seed."""
    found = yield from _rates(candidate, [0], start, target, 0.08)
    tried.append((_crossing(found, target, None), candidate))


def bound_work(base: Question, sample: int = 20_000) -> Work:
    """Work of a large sample of a question's requests."""
    profile = find_profile(base.profile)
    return work_of(make_workload(base.scenario, 1.0, sample, 0, "poisson").bound(profile.model))


def _candidates(base: Question) -> list[Question]:
    entry = policy_entry(base.policy)
    splits = range(1, base.replicas) if entry.make_decode is not None else (base.prefill_replicas,)
    return [
        Question(**{**_fields(base), "parameters": dict(parameters), "prefill_replicas": split})
        for parameters in entry.variants
        for split in splits
    ]


def _fields(question: Question) -> dict[str, Any]:
    return {name: getattr(question, name) for name in question.__dataclass_fields__}


def _split_of(question: Question) -> dict[str, int]:
    apart = policy_entry(question.policy).make_decode is not None
    return {"prefill_replicas": question.prefill_replicas} if apart else {}


def _rates(base: Question, seeds: list[int], start: float, target: float, tolerance: float) -> RateSearch:
    """Evaluate rates until two of them bracket the target within ``tolerance``; returns all, rising."""
    known: dict[float, list[Answer]] = {}

    def ask(rate: float) -> Generator[list[Question], list[Answer], bool]:
        fields = _fields(base) | {"rate_rps": rate, "stop_below": target - STOP_MARGIN}
        known[rate] = yield [Question(**(fields | {"seed": seed})) for seed in seeds]
        return float(np.mean([one.attainment for one in known[rate]])) >= target

    rate = start
    good = yield from ask(rate)
    low, high = (rate, math.inf) if good else (0.0, rate)
    step = COARSE_STEP if tolerance > FINE_TOLERANCE else 1.0 + 4.0 * tolerance
    for _ in range(MAX_BRACKET_STEPS):
        if low > 0.0 and high < math.inf:
            break
        rate = low * step if low > 0.0 else high / step
        step = min(step * 1.3, 3.0)
        if (yield from ask(rate)):
            low = rate
        else:
            high = rate
    while low > 0.0 and high < math.inf and high / low > 1.0 + tolerance:
        rate = math.sqrt(low * high)
        if (yield from ask(rate)):
            low = rate
        else:
            high = rate
    return sorted(known.items())


def _crossing(found: list[tuple[float, list[Answer]]], target: float, seed: int | None) -> float:
    """Rate at which attainment falls below the target, linear between rates tried; 0 when it always is."""
    rates = [rate for rate, _ in found]
    values = [
        float(np.mean([one.attainment for one in answers])) if seed is None else answers[seed].attainment
        for _, answers in found
    ]
    above = [i for i, value in enumerate(values) if value >= target]
    if not above:
        return 0.0 if seed is None else rates[0] * values[0] / target
    last = above[-1]
    if last + 1 == len(rates):
        return rates[-1]
    share = (values[last] - target) / max(values[last] - values[last + 1], 1e-9)
    return rates[last] + share * (rates[last + 1] - rates[last])


def _attainment_at(found: list[tuple[float, list[Answer]]], rate: float) -> float:
    values = [float(np.mean([one.attainment for one in answers])) for _, answers in found]
    return float(np.interp(rate, [rate for rate, _ in found], values))


def _nearest_below(found: list[tuple[float, list[Answer]]], rate: float) -> list[Answer]:
    below = [answers for tried, answers in found if tried <= rate * (1.0 + 1e-9)]
    return below[-1] if below else found[0][1]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _interval(crossings: list[float], centre: float) -> tuple[float, float]:
    """Student's t interval around ``centre`` from the seeds' own crossings; of no width with one seed."""
    if len(crossings) < 2:
        return (centre, centre)
    spread = float(np.std(crossings, ddof=1)) / math.sqrt(len(crossings))
    half = _T_95.get(len(crossings) - 1, 2.0) * spread
    return (max(centre - half, 0.0), centre + half)
