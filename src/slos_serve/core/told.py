"""What a client is told of its request: in the head of the answer, and with the usage at the end of a stream.

One server and an endpoint in front of many say the same by this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slos_serve.core.verdict import SENTENCES, Verdict, Why

# The times of a :class:`Told`, each a header and a key.
_TIMES = (
    *("target_ttft_s", "target_tpot_s", "target_e2e_s", "task_left_s"),
    *("predicted_ttft_s", "predicted_tpot_s", "predicted_start_s"),
)


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a request.

    Attributes:
        slo_class: name of its class, ``None`` without one.
        verdict, reason: see :mod:`slos_serve.core.verdict`; ``None`` for a request that was not judged.
        rank: which of its class's promises it was given, 0 for the first.
        target_ttft_s, target_tpot_s: promised; ``inf`` without such a promise.
        target_e2e_s, task_left_s: what a call of a task may take, and what is left of its task; ``inf`` without one.
        predicted_ttft_s, predicted_tpot_s: of a request that is promised something; else ``inf``.
        predicted_start_s: time to the first token, forecast where nothing is promised; else ``inf``.
    """

    slo_class: str | None = None
    verdict: Verdict | None = None
    reason: Why | None = None
    rank: int = 0
    target_ttft_s: float = math.inf
    target_tpot_s: float = math.inf
    target_e2e_s: float = math.inf
    task_left_s: float = math.inf
    predicted_ttft_s: float = math.inf
    predicted_tpot_s: float = math.inf
    predicted_start_s: float = math.inf

    def headers(self) -> dict[str, str]:
        """Verdict, reason, targets and predictions; nothing for a request that was not judged."""
        if self.verdict is None or self.reason is None:
            return {}
        found = {
            "x-slo-verdict": str(self.verdict),
            "x-slo-reason": str(self.reason),
            "x-slo-reason-text": SENTENCES[self.reason],
        }
        if self.rank:
            found["x-slo-rank"] = str(self.rank)
        named = {f"x-slo-{name.removesuffix('_s').replace('_', '-')}-ms": getattr(self, name) for name in _TIMES}
        return found | {name: f"{value * 1e3:.0f}" for name, value in named.items() if math.isfinite(value)}

    def measured(self, ttft_s: float, tpot_s: float) -> dict[str, object]:
        """What the usage says: the same, and what was measured; times in milliseconds, ``inf`` where there is none."""
        found: dict[str, object] = {"class": self.slo_class}
        if self.verdict is not None:
            found |= {"verdict": self.verdict, "reason": self.reason, "rank": self.rank}
        named = {"ttft_s": ttft_s, "tpot_s": tpot_s} | {name: getattr(self, name) for name in _TIMES}
        times = {f"{name.removesuffix('_s')}_ms": value for name, value in named.items() if math.isfinite(value)}
        return found | {name: round(value * 1e3, 1) for name, value in times.items()}


def known(seconds: float | None) -> float:
    """``inf`` for ``None``."""
    return math.inf if seconds is None else seconds


def tpot_between_s(first_s: float | None, last_s: float | None, output_tokens: int) -> float:
    """Seconds per output token of a stream after its first; ``inf`` with fewer than two."""
    if first_s is None or last_s is None or output_tokens < 2:
        return math.inf
    return (last_s - first_s) / (output_tokens - 1)
