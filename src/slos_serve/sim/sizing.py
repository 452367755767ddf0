"""How many servers traffic needs: each number tried in a simulation of a stretch of that traffic.

A number of servers is enough when no class of requests has more violations than asked for. The search doubles its steps
from a first guess on, then bisects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from slos_serve.files.profile_file import Profile
from slos_serve.sim.bounds import fluid_bound, work_of
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import kv_bytes_per_token, limits_of
from slos_serve.sim.recording import Recording
from slos_serve.workload.calls import Workload

# Requests of an offline run: as many as vLLM's own throughput benchmark sends.
OFFLINE_REQUESTS = 1000


@dataclass(frozen=True, slots=True)
class Trial:
    """One simulation of a fleet.

    Attributes:
        servers: how many; a mean where they come and go.
        violations: share of all requests that did not attain.
        worst: that share of the class that has most.
        busy: share of the servers' time in which steps ran.
    """

    servers: float
    violations: float
    worst: float
    busy: float


@dataclass
class Trials:
    """Simulations of one workload on fleets of different sizes, each size once.

    Attributes:
        workload: what arrives.
        profile: of every server.
        settings: everything but the number of servers.
        tried: told of every simulation.
    """

    workload: Workload
    profile: Profile
    settings: SimSettings
    tried: Callable[[Trial], None] = lambda _: None
    known: dict[int, Trial] = field(default_factory=dict)

    def of(self, servers: int) -> Trial:
        """What so many servers do."""
        if servers not in self.known:
            fleet = replace(
                self.settings,
                replicas=servers,
                prefill_replicas=max(servers // 2, 1) if self.settings.num_prefill else 0,
                kv_bytes_per_token=kv_bytes_per_token(self.profile),
            )
            recording = simulate(self.workload, self.profile.model, limits_of(self.profile), fleet)
            self.known[servers] = trial_of(recording, servers)
            self.tried(self.known[servers])
        return self.known[servers]

    def fewest(self, violations: float, most: int, first: int = 1) -> int | None:
        """The fewest servers with which no class has more violations; ``None`` when ``most`` do not suffice.

        Args:
            violations: allowed share.
            most: servers to try.
            first: where to begin.
        """
        least = 2 if self.settings.num_prefill else 1
        if most < least:
            return None
        size = min(max(first, least), most)
        step = 1
        if self._enough(size, violations):
            high, low = size, least - 1
            while high > least:
                size = max(high - step, least)
                if not self._enough(size, violations):
                    low = size
                    break
                high, step = size, 2 * step
        else:
            low = size
            while True:
                if low >= most:
                    return None
                high = min(low + step, most)
                if self._enough(high, violations):
                    break
                low, step = high, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._enough(middle, violations) else (middle, high)
        return high

    def _enough(self, servers: int, violations: float) -> bool:
        return self.of(servers).worst <= violations


def trial_of(recording: Recording, servers: float, since_s: float = 0.0) -> Trial:
    """What a run on so many servers, in the mean, comes to; only what came and ran from ``since_s`` on counts."""
    outcome = summarize_run(recording, recording.workload.request_arrivals_s >= since_s)
    steps = recording.steps.rows
    busy_s = float(steps["duration_s"][steps["start_s"] >= since_s].sum(dtype=np.float64))
    worst = 1.0 - min(outcome.by_class.values(), default=1.0)
    busy = min(busy_s / max(servers * (recording.end_s - since_s), 1e-9), 1.0)
    return Trial(servers, 1.0 - outcome.attainment, worst, busy)


def mean_load_rps(workload: Workload, profile: Profile) -> float:
    """Requests a second that one server can carry if every moment were like the mean: the fluid bound."""
    work = work_of(workload.bound(profile.model), profile.block_size)
    return fluid_bound(work, profile.model, limits_of(profile))


def offline_rps(workload: Workload, profile: Profile, settings: SimSettings) -> float:
    """Requests a second of one server that has them all at once, as a benchmark of throughput measures it."""
    calls = workload.calls[:OFFLINE_REQUESTS].copy()
    calls["arrival_s"] = 0.0
    calls["session"], calls["next_call"] = np.arange(len(calls)), -1
    offline = Workload(workload.name, workload.classes, calls)
    recording = simulate(offline, profile.model, limits_of(profile), replace(settings, replicas=1))
    return len(calls) / recording.end_s
