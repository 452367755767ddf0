"""Compile a router's kernels (or load them from their cache) before the first request has to wait for it."""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView
from slos_serve.core.request import RequestTable
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.class_shares import ClassShares
from slos_serve.planning.planner import Planner
from slos_serve.routing.headroom import headroom_prefill_tokens, room_of
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.predicted import predicted
from slos_serve.routing.publisher import publication_of, snapshot_of
from slos_serve.routing.retry_after import RetryTimes
from slos_serve.routing.router import RouterSettings, RoutingRequest, route


def warm_up_routing() -> None:
    """Route requests of every kind to an imaginary replica, and count by tenant as a front end does what it refuses."""
    ClassShares(1, 0.5).decided(np.array([0, 1]), np.array([True, False]), np.ones(2))
    model = BatchTimeModel(0.1e-3, 5e-3, 0.05e-3, 20e-3)
    none = np.empty(0, dtype=np.int64)
    view = EngineView(
        table=RequestTable(1),
        running=none,
        waiting=none,
        free_blocks=1000,
        total_blocks=1000,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
    )
    mirrors = Mirrors(["warm-up"])
    publication = publication_of(Planner(model, 1), model, snapshot_of(view, 0.0), replica="warm-up")
    mirrors.update(publication)
    for due_s, cached in ((9.0, {"warm-up": 16}), (1e-6, {}), (np.inf, {}), (9.0, {})):
        asked = RoutingRequest(0.0, 800, 64, ttft_due_s=due_s, tpot_s=0.1 if due_s < np.inf else due_s, cached=cached)
        route(0.0, asked, mirrors, RouterSettings())
    RetryTimes(mirrors).next_s(0.0, asked, 1.0)
    predicted(mirrors, "warm-up", 0.0, asked)
    headroom_prefill_tokens(publication, asked, 0.0)
    room_of(publication, 0.0, 0.0)
