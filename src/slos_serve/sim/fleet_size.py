"""Ways to size a fleet for a day: by simulation of each policy, by the mean load, by throughput, by headroom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slos_serve.files.profile_file import Profile
from slos_serve.policies.registry import Parameters
from slos_serve.routing.demand import TARGET_FULLNESS
from slos_serve.sim.conditions import Conditions
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.power import Power
from slos_serve.sim.profiles import limits_of
from slos_serve.sim.recording import Recording
from slos_serve.sim.scaled_router import ScaledRouter, Scaling
from slos_serve.sim.sizing import Trial, Trials, mean_load_rps, offline_rps, trial_of
from slos_serve.sim.slo_router import SloRouting
from slos_serve.sim.tasks import SimTasks
from slos_serve.sim.traffic import Course, Traffic

OURS, STOCK = "slos-serve", "vllm"
LEVELS = 4
# A fleet that scales is watched for so many stretches, of which the first half only lets it settle.
SCALED_STRETCHES = 6
POOL = 4  # servers that a fleet may grow to, over what the mean load needs

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """What a fleet is sized for.

    Attributes:
        traffic: of the day.
        profile: of every server.
        conditions: between the batch-time model and a step.
        violations: allowed shares of each class's requests, one sizing each.
        most: servers to try.
        seconds: of traffic in one simulation.
    """

    traffic: Traffic
    profile: Profile
    conditions: Conditions
    violations: tuple[float, ...] = (0.01, 0.05)
    most: int = 256
    seconds: float = 120.0

    @property
    def rates(self) -> Floats:
        """float64 [LEVELS]: rates that are simulated, from the day's lowest (a twentieth of the peak at least) up."""
        peak = self.traffic.peak_rps
        lowest = max(float(self.traffic.course.relative.min()), 0.05)
        return np.linspace(lowest * peak, peak, LEVELS if lowest < 1.0 else 1)

    def settings(self, policy: str, parameters: Parameters | None = None) -> SimSettings:
        """Of a fleet under a policy: ours routes by mirrors, others to the least loaded."""
        router = "slo" if policy == OURS else "least-loaded"
        return self.conditions.on(SimSettings(policy=policy, parameters=parameters, router=router))


@dataclass(frozen=True)
class Size:
    """One way to size the fleet.

    Attributes:
        by: what it goes by.
        policy: that serves in it.
        allowed: share of violations it was searched for; ``None`` where it was not searched.
        at_rates: what its servers do at each of :attr:`Asked.rates`; whole numbers, but where servers come and go.
        all_day: what the servers of the busiest time do at each rate; ``None`` where servers come and go.
    """

    by: str
    policy: str
    allowed: float | None
    at_rates: tuple[Trial, ...]
    all_day: tuple[Trial, ...] | None

    @property
    def peak(self) -> Trial:
        """At the busiest time."""
        return self.at_rates[-1]


@dataclass(frozen=True)
class Sized:
    """The answer.

    Attributes:
        rates: see :attr:`Asked.rates`.
        sizes: found ways, in the order of a table.
        failed: (policy, violations) for which ``most`` servers did not suffice.
        mean_rps, offline_rps: that one server carries by the mean, and by vLLM's throughput.
    """

    rates: Floats
    sizes: tuple[Size, ...]
    failed: tuple[tuple[str, float], ...]
    mean_rps: float
    offline_rps: float


def size_fleet(
    asked: Asked, policies: Sequence[tuple[str, Parameters | None]], tried: Callable[[str, float, Trial], None]
) -> Sized:
    """Size the fleet in every way.

    Args:
        asked: for what.
        policies: names and parameters to search with; ours adds a fleet that is scaled by headroom.
        tried: told (way, requests a second, result) of every simulation.
    """
    rates = asked.rates
    sample = asked.traffic.at(float(rates[-1]), asked.seconds)
    mean_rps = mean_load_rps(sample, asked.profile)
    stock = asked.settings(STOCK)
    throughput = offline_rps(sample, asked.profile, stock)
    sizes: list[Size] = []
    failed: list[tuple[str, float]] = []
    stock_trials: list[Trials] | None = None
    for policy, parameters in policies:
        trials = _trials(asked, policy, asked.settings(policy, parameters or None), tried)
        if policy == STOCK and not parameters:
            stock_trials = trials
        for allowed in sorted(asked.violations):
            found = _searched(asked, trials, policy, allowed, mean_rps)
            if found is None:
                failed.append((policy, allowed))
            else:
                sizes.append(found)
    if any(policy == OURS for policy, _ in policies):
        sizes.append(_scaled(asked, mean_rps, tried))
    if stock_trials is None:
        stock_trials = _trials(asked, STOCK, stock, tried)
    for by, rps in (("mean load", mean_rps), ("vLLM's throughput", throughput)):
        counts = [max(math.ceil(rate / rps - 1e-9), 1) for rate in rates]
        sizes.append(_size(by, STOCK, None, stock_trials, counts))
    return Sized(rates, tuple(sizes), tuple(failed), mean_rps, throughput)


def _trials(asked: Asked, way: str, settings: SimSettings, tried: Callable[[str, float, Trial], None]) -> list[Trials]:
    def told(rate: float) -> Callable[[Trial], None]:
        return lambda trial: tried(way, rate, trial)

    rates = [float(rate) for rate in asked.rates]
    return [Trials(asked.traffic.at(rate, asked.seconds), asked.profile, settings, told(rate)) for rate in rates]


def _searched(asked: Asked, trials: list[Trials], policy: str, allowed: float, mean_rps: float) -> Size | None:
    """By simulation: at the busiest rate first, which tells where to look at the others."""
    counts: list[int] = []
    guess = float(asked.rates[-1]) / mean_rps
    for rate, each in zip(asked.rates[::-1], reversed(trials), strict=True):
        share = float(rate) / float(asked.rates[-1])
        most = asked.most if not counts else counts[-1]
        found = each.fewest(allowed, most, math.ceil(guess * share))
        if found is None:
            if not counts:
                return None
            found = counts[-1]  # noise at a lower rate: what the higher one needs is enough
        counts.append(found)
        guess = max(found / share, 1.0)
    return _size(f"{policy}, {100 * allowed:g} %", policy, allowed, trials, counts[::-1])


def _size(by: str, policy: str, allowed: float | None, trials: Sequence[Trials], counts: Sequence[int]) -> Size:
    at_rates = tuple(each.of(count) for each, count in zip(trials, counts, strict=True))
    return Size(by, policy, allowed, at_rates, tuple(each.of(counts[-1]) for each in trials))


def _scaled(asked: Asked, mean_rps: float, tried: Callable[[str, float, Trial], None]) -> Size:
    """Ours with as many servers as its headroom asks for, at each rate for itself."""
    found = []
    for rate in map(float, asked.rates):
        seconds = SCALED_STRETCHES * asked.seconds
        first = max(math.ceil(rate / mean_rps / TARGET_FULLNESS), 1)
        pool = max(min(POOL * first, asked.most), first)
        workload = asked.traffic.at(rate, seconds)
        scaling = Scaling(first, settle_s=_settle_s(float(workload.request_arrivals_s.max()), asked.seconds))
        routers: list[ScaledRouter] = []

        def make(
            recording: Recording,
            routing: SloRouting,
            tasks: SimTasks,
            scaling: Scaling = scaling,
            routers: list[ScaledRouter] = routers,
        ) -> ScaledRouter:
            routers.append(ScaledRouter(recording, routing, tasks, scaling))
            return routers[-1]

        fleet = replace(asked.settings(OURS), replicas=pool)
        model, limits = asked.profile.model, limits_of(asked.profile)
        recording = simulate(workload, model, limits, fleet, make_slo_router=make)
        router = routers[0]
        trial = trial_of(recording, router.server_s / max(router.counted_s, 1e-9), scaling.settle_s)
        tried("by headroom", rate, trial)
        found.append(trial)
    return Size(f"{OURS}, by headroom", OURS, None, tuple(found), None)


def _settle_s(last_s: float, stretch_s: float) -> float:
    """How long a fleet may settle when the last request comes at ``last_s``.

    Half of all stretches; half of the requests' time where a short trace would leave less than a stretch to count.
    """
    half_s = 0.5 * SCALED_STRETCHES * stretch_s
    return half_s if last_s >= half_s + stretch_s else 0.5 * last_s


# ------------------------------------------------------------------------------------------------------------- day


@dataclass(frozen=True, slots=True)
class DayUse:
    """What a day takes.

    Attributes:
        server_hours: of all servers.
        kwh: at :class:`Power`; ``nan`` where that is unknown.
    """

    server_hours: float
    kwh: float


def servers_through(size: Size, rates: Floats, course: Course) -> Floats:
    """float64 [parts]: servers in each part of the day: what it or the next part needs, whichever is more."""
    counts = np.array([trial.servers for trial in size.at_rates])
    needed = np.interp(course.relative * rates[-1], rates, counts)
    if size.all_day is not None:
        needed = np.ceil(needed - 1e-9)
    return np.asarray(np.maximum(needed, np.roll(needed, -1)))


def day_use(size: Size, rates: Floats, course: Course, power: Power | None, *, all_day: bool) -> DayUse:
    """Server-hours and energy of a day.

    Args:
        size: how the fleet is sized.
        rates: that it was sized at.
        course: of the day.
        power: of a server, if known.
        all_day: the busiest time's servers stay all day; otherwise they follow the course.
    """
    at_rate = course.relative * rates[-1]
    trials = size.all_day if all_day and size.all_day is not None else size.at_rates
    busy = np.interp(at_rate, rates, [trial.busy for trial in trials])
    servers = np.full(len(at_rate), size.peak.servers) if all_day else servers_through(size, rates, course)
    hours = servers * course.hours / len(at_rate)
    if power is None:
        return DayUse(float(hours.sum()), math.nan)
    watts = busy * power.busy + (1.0 - busy) * power.idle
    return DayUse(float(hours.sum()), float((hours * watts).sum()) / 1000.0)
