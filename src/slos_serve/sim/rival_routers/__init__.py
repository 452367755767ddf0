"""Routers that others published, one file each, to compare ours with.

They see every replica's requests as they are when a call arrives, without the delay that ours has. None holds a call
back at the router and none rejects one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.rival_routers.class_preferring import ClassPreferring
from slos_serve.sim.rival_routers.lmetric import LMetric
from slos_serve.sim.rival_routers.tpot_bins import TpotBins


class _Chooses(Protocol):
    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica: ...

    def on_idle(self, now_s: float, replica: Replica) -> None: ...


RIVAL_ROUTERS: dict[str, Callable[[Recording, BatchTimeModel], _Chooses]] = {
    "lmetric": LMetric,
    "class-preferring": ClassPreferring,
    "tpot-bins": TpotBins,
}
