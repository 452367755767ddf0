"""LMetric: the product of new prompt tokens and batch size, the smallest first.

The tokens are those that wait on the replica and those of the call that its cache does not supply. The batch size
counts all its requests. Multiplied, the two need no weights: a scale of either cancels out in the comparison. An empty
replica scores 0 whatever its cache, so equals are told apart by the tokens. Source: Zhang et al., OSDI 2026 (arXiv
2603.15202). Left out: the paper's detector of hot prefixes, which falls back to balancing the load alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.rival_routers.load import load_of


class LMetric:
    """See :class:`slos_serve.sim.routers.LoadRouter`; it knows of no promise."""

    def __init__(self, recording: Recording, model: BatchTimeModel) -> None:
        self._prompt_tokens = recording.workload.calls["prompt_tokens"]

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica:
        """The smallest product."""

        def score(replica: Replica) -> tuple[int, int]:
            load = load_of(replica)
            new_tokens = load.prompt_tokens + int(self._prompt_tokens[call]) - replica.cached_tokens(call)
            return new_tokens * load.count, new_tokens

        return min(replicas, key=score)

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Nothing to know."""
