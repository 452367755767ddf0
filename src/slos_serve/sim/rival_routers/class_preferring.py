"""Class-preferring: of the replicas that would keep every pace, the one with the most requests of the call's pace.

A replica is feasible when its mean step over the horizon, with the call, stays within a share of the tightest pace that
it holds, the call's included. Requests of one pace gather: a replica without tight requests may run slow steps. Where
no replica is feasible the least busy one, by that mean step over its pace, gets the call. After FluidServe (2026, notes
and configurations in public; unpublished). Simplified: classes are told apart by TPOT; the original lets a call wait at
the router while it has slack and asks again, weighs what each request has left of its budget, and sheds what is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.rival_routers.load import call_of, class_means, load_of, mean_step_s

PACE_SHARE = 0.9


class ClassPreferring:
    """See :class:`slos_serve.sim.routers.LoadRouter`."""

    def __init__(self, recording: Recording, model: BatchTimeModel) -> None:
        self._recording, self._model = recording, model
        self._means = class_means(recording)

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica:
        """The feasible replica with most of the pace, else the one whose steps are shortest for its pace."""

        def rank(replica: Replica) -> tuple[bool, float, float]:
            load, asked = load_of(replica), call_of(self._recording, call, replica, self._means)
            pace_s = min(float(load.tpots_s.min(initial=asked.tpot_s)), asked.tpot_s)
            used = mean_step_s(self._model, load, asked) / pace_s  # 0 where nobody has a pace
            feasible = used <= PACE_SHARE
            return not feasible, -load.like(asked.tpot_s) if feasible else 0.0, used or float(load.count)

        return min(replicas, key=rank)

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Nothing to know."""
