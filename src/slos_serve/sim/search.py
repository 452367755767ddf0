"""Capacity: the highest rate per GPU at which a target share of requests attains, with a confidence interval.

The same seeded requests come at every rate (common random numbers), so attainment falls smoothly with the rate. Each
seed is bisected by itself until two rates 2 % apart bracket its crossing; the capacity is the mean of the seeds'
crossings and the interval comes from their spread. Nothing is interpolated, so a run may end as soon as it is certain
on which side of the crossing its rate is. A second search does the same for requests with every token in time.

Parameters of a policy are compared on a tuning seed; the best of them is then searched on the seeds of the table.
Searches are generators that ask for evaluations and get results: whoever drives them decides on processes, caching and
progress.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from slos_serve.policies.registry import policy_entry
from slos_serve.sim.bisection import FINE_TOLERANCE, Bisection
from slos_serve.sim.drafters import NO_DRAFTER
from slos_serve.sim.interval import seed_interval
from slos_serve.sim.profiles import find_profile
from slos_serve.sim.question import Answer, Question
from slos_serve.sim.rate_bounds import bounds_of, too_short
from slos_serve.sim.seeds import tuning_seeds

# Fixed draft lengths that a policy without its own is tried with, on the best of its other parameters.
FIXED_DRAFTS = (2, 4)
COARSE_TOLERANCE = 0.08
# A search begins near what an engine carries. A run that is good at this many times as much is good at any rate.
MOST_OVER_START = 1000.0


@dataclass(frozen=True)
class Capacity:
    """Result of a search.

    Attributes:
        capacity_rps_per_gpu, ci, by_seed: highest rate with the target attainment over GPUs: mean of the seeds' own,
            its 95 % interval, and each.
        strict_rps_per_gpu, strict_ci, strict_by_seed: the same for requests with every token in time.
        attainment: mean of the seeds at the highest rate tried below their crossing.
        fluid_bound_rps_per_gpu, fluid_bound_speculative_rps_per_gpu: no policy that serves all can carry more.
        fluid_bound_dropping_rps_per_gpu: when the costliest tenth of the requests is dropped for free.
        parameters: the best ones tried; tried: the capacity of each on the tuning seed, or what it did not reach.
        curve: (rate per GPU, attainment) of the best on the first seed where runs went on to their end, rising rates.
        at_capacity: further means over the seeds at the rate of ``attainment``.
    """

    scenario: str
    policy: str
    profile: str
    replicas: int
    arrivals: str
    capacity_rps_per_gpu: float
    ci: tuple[float, float]
    by_seed: list[float]
    strict_rps_per_gpu: float
    strict_ci: tuple[float, float]
    strict_by_seed: list[float]
    attainment: float
    fluid_bound_rps_per_gpu: float
    fluid_bound_speculative_rps_per_gpu: float
    fluid_bound_dropping_rps_per_gpu: float
    parameters: dict[str, Any]
    tried: list[dict[str, Any]]
    curve: list[tuple[float, float]]
    admitted_attained: float | None
    by_prompt_quartile: list[float]
    strict: float
    at_capacity: dict[str, Any]
    num_requests: int
    seeds: list[int]
    oracle_lengths: bool
    conditions: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Search = Generator[list[Question], list[Answer], Capacity]
Found = dict[float, Answer]
RateSearch = Generator[list[Question], list[Answer], dict[int, tuple[float, Found]]]


def search_capacity(base: Question, seeds: Sequence[int], target: float = 0.9, variants: bool = True) -> Search:
    """Search one (scenario, policy): best parameters on a tuning seed, then each seed's own crossings.

    Args:
        base: everything but rate, seed and parameters.
        seeds: of the table.
        target: attainment asked for.
        variants: try the policy's parameter sets; else only the one in ``base``.
    """
    bounds = bounds_of(base)
    screened = Screened(base, 0.0, [])
    if variants and (len(candidates(base)) > 1 or base.drafter != NO_DRAFTER):
        screened = yield from screen(base, target)
    elif variants:
        screened = Screened(candidates(base)[0], 0.0, [])
    return (yield from search_seeds(screened, seeds, target, bounds))


def search_seeds(
    screened: Screened, seeds: Sequence[int], target: float = 0.9, bounds: tuple[float, float, float] | None = None
) -> Search:
    """The crossings of one parameter set, each seed by itself; see :func:`search_capacity`."""
    best = screened.best
    bounds = bounds or bounds_of(best)
    start = max(screened.rate_rps, 0.05 * bounds[0]) if screened.tried else 0.6 * bounds[0] * best.replicas
    found = yield from _crossings(best, seeds, dict.fromkeys(seeds, start), target, FINE_TOLERANCE, "attainment", {})
    starts = {seed: max(crossing, 0.05 * bounds[0]) for seed, (crossing, _) in found.items()}
    known = {seed: answers for seed, (_, answers) in found.items()}
    strict = yield from _crossings(best, seeds, starts, target, FINE_TOLERANCE, "strict", known)
    return _result(best, seeds, bounds, screened.tried, found, strict)


def is_behind(
    screened: Screened, others: Sequence[Capacity], seeds: Sequence[int], target: float = 0.9
) -> Generator[list[Question], list[Answer], bool]:
    """Whether by each metric one of ``others`` carries more on every seed; asks once a seed and metric at most.

    Args:
        screened: who is compared.
        others: what was found on the same seeds; empty: nobody is behind.
        seeds: of the table.
        target: attainment asked for.
    """
    gpus = screened.best.replicas * find_profile(screened.best.profile).tensor_parallel
    for metric, by_seed in (("attainment", "by_seed"), ("strict", "strict_by_seed")):
        if not others:
            return False
        rates = max((getattr(one, by_seed) for one in others), key=sum)
        if min(rates) <= 0.0:
            return False
        asked = [screened.best.at(rate * gpus, seed, target, metric) for rate, seed in zip(rates, seeds, strict=True)]
        answers = yield asked
        if any(getattr(one, metric) >= target for one in answers):
            return False
    return True


Crossings = Mapping[int, tuple[float, Found]]


def _result(
    best: Question,
    seeds: Sequence[int],
    bounds: tuple[float, float, float],
    tried: Sequence[Tried],
    found: Crossings,
    strict: Crossings,
) -> Capacity:
    """The capacity of the best parameters from each seed's crossings."""
    tensor_parallel = find_profile(best.profile).tensor_parallel
    gpus = best.replicas * tensor_parallel
    at = [_nearest_below(answers, crossing) for crossing, answers in found.values()]
    own = [crossing / gpus for crossing, _ in found.values()]
    own_strict = [crossing / gpus for crossing, _ in strict.values()]
    return Capacity(
        scenario=best.scenario,
        policy=best.policy,
        profile=best.profile,
        replicas=best.replicas,
        arrivals=best.arrivals,
        capacity_rps_per_gpu=float(np.mean(own)),
        ci=seed_interval(own),
        by_seed=own,
        strict_rps_per_gpu=float(np.mean(own_strict)),
        strict_ci=seed_interval(own_strict),
        strict_by_seed=own_strict,
        attainment=float(np.mean([one.attainment for one in at])),
        fluid_bound_rps_per_gpu=bounds[0] / tensor_parallel,
        fluid_bound_speculative_rps_per_gpu=bounds[1] / tensor_parallel,
        fluid_bound_dropping_rps_per_gpu=bounds[2] / tensor_parallel,
        parameters={**best.parameters, **_split_of(best)},
        tried=[
            {
                "parameters": {**one.question.parameters, **_split_of(one.question)},
                "rps_per_gpu": one.rate_rps / gpus,
                "at_most": one.at_most,
            }
            for one in tried
        ],
        curve=[
            (rate / gpus, one.attainment) for rate, one in sorted(found[seeds[0]][1].items()) if not one.stopped_early
        ],
        admitted_attained=mean_of([one.admitted_attained for one in at]),
        by_prompt_quartile=[float(x) for x in np.mean([one.by_prompt_quartile for one in at], axis=0)],
        strict=float(np.mean([one.strict for one in at])),
        at_capacity=_at_capacity(at),
        num_requests=best.num_requests,
        seeds=list(seeds),
        oracle_lengths=best.oracle_lengths,
        conditions=asdict(best.conditions),
    )


@dataclass(frozen=True)
class Tried:
    """What one parameter set of a policy came to on a tuning seed.

    Attributes:
        rate_rps: its crossing, to within 8 %.
        question: with it.
        at_most: it failed at ``rate_rps``, where an earlier one was about as good: it was not searched further.
    """

    rate_rps: float
    question: Question
    at_most: bool = False


@dataclass(frozen=True)
class Screened:
    """The best parameters of a policy on a tuning seed.

    Attributes:
        best: the question with them.
        rate_rps: their crossing, to within 8 %; only an upper bound when ``at_most``.
        tried: each parameter set.
    """

    best: Question
    rate_rps: float
    tried: list[Tried]

    @property
    def at_most(self) -> bool:
        """Every parameter set failed at the rate that was to be beaten."""
        return all(one.at_most for one in self.tried) and bool(self.tried)


def screen(
    base: Question, target: float = 0.9, beat_rps: float = 0.0
) -> Generator[list[Question], list[Answer], Screened]:
    """Compare a policy's parameter sets on a tuning seed, then fixed draft lengths on the best of them.

    A set that fails a little above what the best before it carries is dropped after that one simulation.

    Args:
        base: everything but rate, seed and parameters.
        target: attainment asked for.
        beat_rps: a rate that the policy must carry to be of interest; 0 to search it in any case.
    """
    fluid, _, _ = bounds_of(base)
    (seed,) = tuning_seeds(1)
    tried: list[Tried] = []

    def best() -> Tried:
        return max(tried, key=lambda one: (not one.at_most, one.rate_rps))

    def try_one(candidate: Question) -> Generator[list[Question], list[Answer], None]:
        found = [one.rate_rps for one in tried if not one.at_most]
        hurdle = max([*found, beat_rps])
        start, known = 0.6 * fluid * base.replicas, {}
        if hurdle > 0.0:
            above = hurdle * (1.0 + COARSE_TOLERANCE)
            (asked,) = yield [candidate.at(above, seed, target)]
            if asked.attainment < target:
                tried.append(Tried(above, candidate, at_most=True))
                return
            start, known = above, {seed: {above: asked}}
        crossings = yield from _crossings(
            candidate, [seed], {seed: start}, target, COARSE_TOLERANCE, "attainment", known
        )
        tried.append(Tried(crossings[seed][0], candidate))

    for candidate in candidates(base):
        yield from try_one(candidate)
    drafts = FIXED_DRAFTS if base.drafter != NO_DRAFTER and policy_entry(base.policy).fixed_drafts else ()
    plain = best().question
    for length in drafts:
        yield from try_one(replace(plain, parameters={**plain.parameters, "draft_tokens": length}))
    return Screened(best().question, best().rate_rps, tried)


def candidates(base: Question) -> list[Question]:
    """A question with each parameter set of its policy, and each split of its replicas where they are apart."""
    entry = policy_entry(base.policy)
    splits = range(1, base.replicas) if entry.make_decode is not None else (base.prefill_replicas,)
    return [
        replace(base, parameters=dict(parameters), prefill_replicas=split)
        for parameters in entry.variants
        for split in splits
    ]


def _split_of(question: Question) -> dict[str, int]:
    apart = question.prefill_replicas > 0
    return {"prefill_replicas": question.prefill_replicas} if apart else {}


def _crossings(
    base: Question,
    seeds: Sequence[int],
    starts: Mapping[int, float],
    target: float,
    tolerance: float,
    metric: str,
    known: Mapping[int, Found],
) -> RateSearch:
    """Each seed's own crossing of the target and every answer that led to it; ``known`` answers are used first.

    Raises:
        InvalidFieldError: no rate is too high, because a run has too few requests.
    """
    searches = {seed: Bisection(starts[seed], tolerance) for seed in seeds}
    found: dict[int, Found] = {seed: dict(known.get(seed, {})) for seed in seeds}
    for seed, search in searches.items():
        for known_rate, one in sorted(found[seed].items()):
            search.tell(known_rate, getattr(one, metric) >= target)
    while True:
        rates = {seed: searches[seed].next_rate() for seed in seeds}
        wanted = {seed: rate for seed, rate in rates.items() if rate and rate <= MOST_OVER_START * starts[seed]}
        if not wanted:
            break
        answers = yield [base.at(rate, seed, target, metric) for seed, rate in wanted.items()]
        for (seed, rate), one in zip(wanted.items(), answers, strict=True):
            found[seed][rate] = one
            searches[seed].tell(rate, getattr(one, metric) >= target)
    for search in searches.values():
        if search.high == math.inf:
            raise too_short(base, search.low, target)
    return {seed: (searches[seed].crossing, found[seed]) for seed in seeds}


def _nearest_below(answers: Found, rate: float) -> Answer:
    below = [tried for tried in answers if tried <= rate * (1.0 + 1e-9)]
    return answers[max(below)] if below else answers[min(answers)]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of what is known."""
    some = [value for value in values if value is not None]
    return float(np.mean(some)) if some else None


def _at_capacity(at: Sequence[Answer]) -> dict[str, Any]:
    classes = sorted({name for one in at for name in one.by_class or {}})
    shares: dict[str, Any] = {
        metric: {name: mean_of([(getattr(one, metric) or {}).get(name) for one in at]) for name in classes}
        for metric in ("by_class", "strict_by_class")
    }
    columns = ("tokens_per_s", "goodput_tokens_per_s", "recomputed")
    shares |= {name: float(np.mean([getattr(one, name) for one in at])) for name in columns}
    shares["strict_by_prompt_quartile"] = [float(x) for x in np.mean([one.strict_by_prompt_quartile for one in at], 0)]
    for name in ("unpromised_ttft_ms", "unpromised_last_ms"):
        shares[name] = [mean_of([getattr(one, name)[i] for one in at]) for i in range(2)]
    return shares
