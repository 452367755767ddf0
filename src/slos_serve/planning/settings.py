"""The planner's settings. Each can be set in the class file's section ``scheduler:`` (docs/settings.md)."""

from __future__ import annotations

from dataclasses import dataclass

from slos_serve.core.request import MAX_DRAFT_TOKENS
from slos_serve.core.slo import check_number


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """How cautious the planner is.

    Attributes:
        margin: share of every TPOT kept in hand, and least share by which batches are planned slower than the corrected
            model says.
        step_quantile: quantile of measured over predicted step times that batches are planned at.
        ttft_margin_s: seconds of every TTFT promise kept for the time outside the engine (HTTP, tokenising).
        length_quantile: quantile of the remaining output length that a request is forecast at.
        max_implied_ttft_s: deadline of a request that is promised a TPOT but no TTFT, seconds after its arrival.
        length_weight: power of the prompt's length that a class's weight is multiplied with: 0 counts requests, 1
            counts prompt tokens, so that long requests are not the first to be declined.
        fairness: requests weigh more while less of their class is promised than this part of the mean of all classes; 0
            leaves weights as they are given, 1 makes the classes' shares as even as weights can.
        aging_s: longest time that the oldest best-effort request goes without progress; 0 for no such rule.
        max_draft_tokens: longest draft that may be planned, 0 to 10; 0 is no speculation. A server without a drafter
            sets 0.
        acceptance_confidence: standard deviations by which drafts are planned below their mean acceptance.
    """

    margin: float = 0.05
    step_quantile: float = 0.99
    ttft_margin_s: float = 0.0
    length_quantile: float = 0.7
    max_implied_ttft_s: float = 30.0
    length_weight: float = 0.0
    fairness: float = 0.7
    aging_s: float = 10.0
    max_draft_tokens: int = 0
    acceptance_confidence: float = 1.0

    def __post_init__(self) -> None:
        for name, (low, high, low_included) in RANGES.items():
            check_number(name, getattr(self, name), low=low, high=high, low_included=low_included)


# Name -> lowest value, highest value, whether the lowest itself is allowed.
RANGES = {
    "margin": (0.0, 0.9, True),
    "step_quantile": (0.5, 0.9999, True),
    "ttft_margin_s": (0.0, 60.0, True),
    "length_quantile": (0.0, 0.999, False),
    "max_implied_ttft_s": (0.0, 3600.0, False),
    "length_weight": (0.0, 2.0, True),
    "fairness": (0.0, 1.0, True),
    "aging_s": (0.0, 86_400.0, True),
    "max_draft_tokens": (0.0, float(MAX_DRAFT_TOKENS), True),
    "acceptance_confidence": (0.0, 10.0, True),
}
# Of these only whole numbers.
WHOLE = frozenset({"max_draft_tokens"})
