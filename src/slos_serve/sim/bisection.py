"""Rates to try until two of them bracket the highest one that is good. Nothing is interpolated."""

from __future__ import annotations

import math

FINE_TOLERANCE = 0.02
# A search that is not a fine one is far from the crossing at first.
COARSE_STEP = 1.3
MAX_BRACKET_STEPS = 14


class Bisection:
    """Rates to try, one after the other, until two bracket the crossing.

    Attributes:
        low, high: highest rate known to be good (0: none) and lowest known to be bad (inf: none).
    """

    def __init__(self, start: float, tolerance: float) -> None:
        self._start = start
        self._tolerance = tolerance
        self._step = COARSE_STEP if tolerance > FINE_TOLERANCE else 1.0 + 4.0 * tolerance
        self._steps_left = MAX_BRACKET_STEPS
        self.low, self.high = 0.0, math.inf

    def next_rate(self) -> float | None:
        """The rate to try; ``None`` when the search has ended."""
        if self.low == 0.0 and self.high == math.inf:
            return self._start
        if self.low > 0.0 and self.high < math.inf:
            narrow = self.high / self.low <= 1.0 + self._tolerance
            return None if narrow else math.sqrt(self.low * self.high)
        if self._steps_left == 0:
            return None
        self._steps_left -= 1
        rate = self.low * self._step if self.low > 0.0 else self.high / self._step
        self._step = min(self._step * 1.3, 3.0)
        return rate

    def tell(self, rate: float, good: bool) -> None:
        """What was found at a rate; what contradicts an earlier answer is left out."""
        if good and rate < self.high:
            self.low = max(self.low, rate)
        elif not good and rate > self.low:
            self.high = min(self.high, rate)

    @property
    def crossing(self) -> float:
        """The middle of the bracket; 0 when no rate was good."""
        return self.low if self.high == math.inf else math.sqrt(self.low * self.high)
