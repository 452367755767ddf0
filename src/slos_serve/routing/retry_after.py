"""When it is worth asking again, for a request that no replica can promise now.

Two things make room: owed prefill that gets computed, and decodes that end. The first is known. The second is forecast
from how many decodes run, how fast they are paced and how long answers of the class are.
"""

from __future__ import annotations

import numpy as np

from slos_serve.routing.mirror_arrays import advance, rate_beside
from slos_serve.routing.mirrors import Mirrors

SOONEST_S = 1.0
LATEST_S = 60.0
UNKNOWN_S = 5.0


def retry_after_s(now_s: float, class_index: int, mirrors: Mirrors, stale_after_s: float) -> float:
    """Seconds until the first replica is expected to have room, in [1, 60].

    Args:
        now_s: present time on the router's clock.
        class_index: class of the request, for how long answers are.
        mirrors: the replicas.
        stale_after_s: a replica that has not published for this long is not counted on.
    """
    usable = mirrors.usable(now_s, stale_after_s)
    found = [room_in_s(now_s, class_index, mirrors, int(k)) for k in np.flatnonzero(usable)]
    return min(max(min(found, default=UNKNOWN_S), SOONEST_S), LATEST_S)


def room_in_s(now_s: float, class_index: int, mirrors: Mirrors, k: int) -> float:
    """Seconds until the owed prompts of the replica at position ``k`` are computed and one of its decodes has ended."""
    m = mirrors.arrays
    advance(m, k, max(now_s, float(m.ready_s[k])))
    first, count = int(m.first[k]), int(m.num_owed[k])
    rate = max(rate_beside(m, k, m.counts[k]), 1e-9)
    owed_s = float(m.cost_tokens[k, first : first + count].sum()) / rate
    paced = np.isfinite(m.pace_s[k]) & (m.counts[k] > 0.0)
    tokens = float(m.forecast_tokens[k, min(class_index, m.forecast_tokens.shape[1] - 1), 0])
    if not paced.any() or not np.isfinite(tokens) or tokens <= 0.0:
        return owed_s
    ends_a_second = float(np.sum(m.counts[k][paced] / (tokens * m.pace_s[k][paced])))
    return owed_s + 1.0 / ends_a_second
