"""What is queued without a promise: prompt tokens still to compute of requests that have no token yet, by share."""

from __future__ import annotations

import numpy as np

from slos_serve.core.plan import EngineView
from slos_serve.core.request import NUM_SHARES, RequestArray, SlotArray
from slos_serve.perf.jit import in_place
from slos_serve.planning.state import ADMITTED, FloatArray, IntArray, tokens_done


def queued_by_share(view: EngineView, taken: SlotArray) -> tuple[IntArray, FloatArray]:
    """Shares with something queued, int64 [q], and how many tokens each, float64 [q].

    Args:
        view: the engine.
        taken: slots of requests that are promised, or are about to be; they are not counted.
    """
    tokens, rows = np.zeros(NUM_SHARES), view.table.rows
    for slots, sign in ((view.running, 1.0), (view.waiting, 1.0), (taken, -1.0)):
        count_queued(rows, slots, sign, tokens)
    shares = np.flatnonzero(tokens > 0.0)
    return shares, tokens[shares]


@in_place
def count_queued(rows: RequestArray, slots: SlotArray, sign: float, tokens: FloatArray) -> None:
    """Add ``sign`` times what these requests have queued to ``tokens``, float64 [NUM_SHARES]."""
    for slot in slots:
        if rows["output_tokens"][slot] == 0 and rows["status"][slot] != ADMITTED:
            tokens[rows["share"][slot]] += sign * max(rows["prompt_tokens"][slot] - tokens_done(rows, slot), 0)
