"""The streams of an engine with their slack, read from the planner's table: what the live page shows of them.

The telemetry thread reads the table while the scheduler changes it. A row may be half of one step and half of the next;
that shows for half a second on a page and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slos_serve.core.request import RequestArray, SlotArray, Status
from slos_serve.core.verdict import Verdict

MOST_STREAMS = 40
UNDECIDED = "undecided"
_VERDICTS = {Status.UNDECIDED: UNDECIDED, Status.ADMITTED: Verdict.ADMITTED, Status.BEST_EFFORT: Verdict.BEST_EFFORT}


def streams_of(
    rows: RequestArray, slots: SlotArray, names: Sequence[str], now_s: float, most: int = MOST_STREAMS
) -> list[dict[str, Any]]:
    """The ``most`` streams with the least slack, the least first; those without a promise, or whose promise was
    given up, come last.

    Slack is the time until the next token is due: the first token by its TTFT, a later one by the stage's mean time per
    output token. Below 0 it is late.

    Args:
        rows: the planner's table.
        slots: rows of unfinished requests.
        names: names of the classes by index.
        now_s: present time on the table's clock.
    """
    found = rows[slots]
    tokens = found["output_tokens"]
    with np.errstate(invalid="ignore"):
        later_s = found["stage_start_s"] + found["stage_tokens"] * found["tpot_s"]
    slack_s = np.where(tokens == 0, found["ttft_due_s"], later_s) - now_s
    slack_s[~np.isfinite(slack_s)] = np.inf
    order = np.lexsort((slack_s, found["status"] == Status.BEST_EFFORT))
    return [_stream(found[at], float(slack_s[at]), names, now_s) for at in order[:most]]


def _stream(row: Any, slack_s: float, names: Sequence[str], now_s: float) -> dict[str, Any]:
    tokens, index = int(row["output_tokens"]), int(row["class_index"])
    phase = "decode" if tokens else "prefill" if row["running"] else "waiting"
    return {
        "slo_class": names[index] if 0 <= index < len(names) else names[-1],
        "verdict": _VERDICTS[Status(int(row["status"]))] if row["has_slo"] else Verdict.NO_SLO,
        "phase": phase,
        "age_s": round(max(now_s - float(row["arrival_s"]), 0.0), 2),
        "prompt_tokens": int(row["prompt_tokens"]),
        "output_tokens": tokens,
        "slack_ms": round(slack_s * 1e3, 1) if np.isfinite(slack_s) else None,
    }
