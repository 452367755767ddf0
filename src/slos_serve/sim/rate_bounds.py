"""What rate an engine can carry at most in a scenario, and how many requests make a rate mean something.

Requests that end before their deadlines however fast they come are a burst, and no rate is too high for them. The
deadlines of a scenario say how many requests are too many even for a scheduler that knows everything.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.sim.bounds import DRAFT_STEP_S, Work, cheapest_share_bound, fluid_bound, work_of
from slos_serve.sim.drafters import NO_DRAFTER, with_drafter
from slos_serve.sim.profiles import find_profile, limits_of
from slos_serve.sim.question import Question
from slos_serve.workload.scenarios import make_workload

SAMPLE = 4000


@cache
def bound_work(scenario: str, profile: str, sample: int = 20_000) -> Work:
    """Work of a large sample of a scenario's requests on an engine."""
    return work_of(make_workload(scenario, 1.0, sample, 0, "poisson").bound(find_profile(profile).model))


def check_can_be_kept(scenario: str, profile: str) -> None:
    """Refuse a scenario of which an engine can carry no rate.

    Raises:
        InvalidFieldError: promises that the engine cannot keep for one request alone.
    """
    served = find_profile(profile)
    if fluid_bound(bound_work(scenario, profile), served.model, limits_of(served)) <= 0.0:
        raise InvalidFieldError("scenario", scenario, f"one whose every TPOT {profile} can keep for one request alone")


def bounds_of(base: Question) -> tuple[float, float, float]:
    """Fluid bounds of one replica in requests/s: of all requests, with drafts, and with the costliest tenth dropped.

    Raises:
        InvalidFieldError: see :func:`check_can_be_kept`.
    """
    check_can_be_kept(base.scenario, base.profile)
    work = bound_work(base.scenario, base.profile)
    profile = find_profile(base.profile)
    limits = limits_of(profile)
    drafting = with_drafter(profile, base.drafter)
    draft_step_s = drafting.model.k_s_s if base.drafter != NO_DRAFTER else DRAFT_STEP_S
    speculative = fluid_bound(work, drafting.model, limits_of(drafting), base.acceptance, draft_step_s)
    dropping = cheapest_share_bound(work, profile.model, limits)
    return fluid_bound(work, profile.model, limits), speculative, dropping


def enough_for(base: Question, target: float) -> int | None:
    """Requests of one replica that are too many to be in time at every rate; see :func:`fewest_requests`."""
    return fewest_requests(base.scenario, base.profile, most_rps(base, target), target)


def most_rps(base: Question, target: float) -> float:
    """Requests/s of one replica that no policy can keep up, the costliest ``1 - target`` of them dropped for free."""
    profile = find_profile(base.profile)
    bound = cheapest_share_bound(bound_work(base.scenario, base.profile), profile.model, limits_of(profile), target)
    return bound if base.drafter == NO_DRAFTER else max(bound, bounds_of(base)[1])


def enough_requests(base: Question, span_s: float) -> int:
    """Requests that take ``span_s`` to arrive at the fluid bound. Fewer are a burst, whose rate is no capacity."""
    return math.ceil(bounds_of(base)[0] * base.replicas * span_s)


def fewest_requests(scenario: str, profile: str, bound_rps: float, target: float) -> int | None:
    """Requests of which one replica cannot serve ``target`` in time when all come at once; two digits, rounded up.

    A share s(D) of n requests is due within D seconds, and until then at most ``bound_rps * D`` are served. So more
    than ``1 - target`` of all are late where n exceeds ``bound_rps * D / (s(D) - (1 - target))`` for some D.

    Args:
        scenario, profile: what is served, and on what.
        bound_rps: requests a second that no scheduler exceeds.
        target: share of requests that is to be in time.

    Returns:
        ``None`` where no number is enough: fewer than ``1 - target`` of the requests have a deadline.
    """
    due_s = np.sort(_due_s(scenario, profile))
    spare = np.arange(1, len(due_s) + 1) / len(due_s) - (1.0 - target)
    counts = np.isfinite(due_s) & (spare > 0.0)
    if not counts.any():
        return None
    fewest = max(float((bound_rps * due_s[counts] / spare[counts]).min()), 1.0)
    unit = int(10 ** max(math.floor(math.log10(fewest)) - 1, 0))
    return math.ceil(fewest / unit) * unit


def too_short(base: Question, rate_rps: float, target: float) -> InvalidFieldError:
    """The fault of a run that no rate is too high for, and what to ask for instead.

    Args:
        base: what was asked.
        rate_rps, target: the highest rate tried, and the share of requests that was still in time.
    """
    given, enough = base.num_requests // base.replicas, enough_for(base, target)
    return InvalidFieldError(
        "--requests",
        given,
        f"{'more' if enough is None else f'{enough} or more'}, because a run this short ends before the deadlines "
        f"of {base.scenario}: even at {rate_rps:,.0f} requests/s, {100 * target:g} % of {given} requests are in time",
    )


def _due_s(scenario: str, profile: str) -> NDArray[np.float64]:
    """float64 [SAMPLE]: seconds from a request's arrival until its last token is due, tools included."""
    calls = make_workload(scenario, 1.0, SAMPLE).bound(find_profile(profile).model).calls
    paced_s = calls["ttft_s"].copy()
    first = calls["first_stage_tokens"]
    for tokens, tpot_s in ((first, calls["tpot_s"]), (calls["output_tokens"] - first, calls["next_tpot_s"])):
        some = tokens > 0
        paced_s[some] += tokens[some] * tpot_s[some]
    own_s = np.fmin(paced_s, calls["e2e_s"]) + calls["tool_s"]
    return np.asarray(np.bincount(calls["session"], weights=own_s, minlength=SAMPLE), dtype=np.float64)
