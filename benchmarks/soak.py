"""A day of virtual time: do the router's and the planners' own objects grow?

python -m benchmarks.soak [--hours 24] [--rate 0.2] [--scenario tool]

Two replicas under the router that serves, one run without a break. Every virtual hour: resident memory of this process,
and entries of every object that outlives a request. Exits 1 when memory after the first two hours grows by more than
2 %, or when a request is left once all have ended. The simulator's own records have their full size from the start.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.sim.cluster import Cluster
from slos_serve.sim.limits import ReplicaSettings
from slos_serve.sim.profiles import find_profile, limits_of
from slos_serve.sim.recording import Recording, StepLog
from slos_serve.sim.replica import Replica
from slos_serve.sim.slo_router import SloRouter, SloRouting
from slos_serve.workload.scenarios import make_workload

HOUR_S = 3600.0
WARM_UP_HOURS = 2
MOST_GROWTH = 0.02
PAGE_BYTES = 4096


class NoSteps(StepLog):
    """The simulator's own record of steps grows with the run and is not what is looked at."""

    def add(self, row: object) -> None:
        """Forget it."""


@dataclass
class Soak:
    """What is looked at, and what was seen."""

    router: SloRouter
    replicas: list[Replica]
    began_s: float = field(default_factory=time.perf_counter)
    resident_mib: list[float] = field(default_factory=list)
    sizes: dict[str, list[int]] = field(default_factory=dict)

    def look(self, now_s: float) -> None:
        """One row of the table."""
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES / 2**20
        self.resident_mib.append(resident)
        found = self.sizes_now()
        for name, size in found.items():
            self.sizes.setdefault(name, []).append(size)
        shown = "".join(f"{size:>14}" for size in found.values())
        if len(self.resident_mib) == 1:
            print(f"{'hour':>6}{'wall s':>9}{'MiB':>9}" + "".join(f"{name:>14}" for name in found), flush=True)
        print(f"{now_s / HOUR_S:>6.1f}{time.perf_counter() - self.began_s:>9.0f}{resident:>9.1f}{shown}", flush=True)

    def sizes_now(self) -> dict[str, int]:
        """Entries of everything that outlives a request."""
        mirrors = self.router.shards
        return {
            "requests": sum(replica.num_requests for replica in self.replicas),
            "table rows": sum(len(replica.view.table.rows) for replica in self.replicas),
            "in flight": sum(one.in_flight(name) for one in mirrors for name in one),
            "owed places": sum(int(one.arrays.due_s.size) for one in mirrors),
            "sessions": len(self.router._sessions),
        }

    def growth(self) -> float:
        """Of memory, from the end of the warm-up to the largest after it."""
        steady = self.resident_mib[WARM_UP_HOURS:]
        return max(steady) / steady[0] - 1.0 if steady else 0.0


def soak(
    hours: Annotated[float, typer.Option(help="Virtual hours.")] = 24.0,
    rate: Annotated[float, typer.Option(help="Requests a second on both replicas.")] = 0.2,
    scenario: Annotated[str, typer.Option(help="As of `slos-serve simulate`.")] = "tool",
) -> None:
    """See the module."""
    profile = find_profile("opt-13b-a100")
    workload = make_workload(scenario, rate, round(hours * HOUR_S * rate), 7)
    recording = Recording.of(workload.bound(profile.model))
    recording.steps = NoSteps()
    recording.token_s.fill(0.0)  # so that all of it is resident from the start
    router = SloRouter(recording, SloRouting())
    replicas = []
    for index in range(2):
        policy = router.watch(index, SLOsServePolicy(profile.model, len(workload.classes)))
        replicas.append(Replica(index, policy, profile.model, limits_of(profile), recording, ReplicaSettings()))
    seen = Soak(router, replicas)
    Cluster(recording, replicas, router, check_every_s=HOUR_S, progress=seen.look).run()
    seen.look(recording.end_s)
    left = seen.sizes_now()
    growth = seen.growth()
    print(f"memory after {WARM_UP_HOURS} hours: +{growth:.1%} at most; left at the end: {left}")
    if growth > MOST_GROWTH or left["requests"]:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(soak)
