"""Keeps the batch-time model right while it serves: follows drift, ignores stalls, knows its own spread.

Two things are learnt from each executed step, both as the log of measured / predicted:

* a centre, whose exponential is :attr:`OnlineCorrection.factor`. A step moves it by a share of the surprise, and the
  surprise is clipped to a few times the usual spread, so a single stall counts for little more than an ordinary slow
  step. The signs of recent surprises are averaged: when nearly all lean to one side they are a change, not noise, and
  the share and the clip widen until the centre has caught up and the signs mix again.
* a high quantile of what is left after the correction, over the last few steps together rather than one by one, by
  stochastic approximation (the estimate goes up a little when a step is above it and down a little when below, in
  proportions that balance at the quantile). A promise takes many steps: slow ones that come alone even out within it,
  slow spells do not, and the time of a few steps in a row tells the two apart.

O(1), scalar floats only: it runs before every batch.
"""

from __future__ import annotations

import math

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.batch_time import BatchShape

MIN_SPREAD = 0.02
CLIP_SPREADS = 2.0
# Signs of surprises are averaged over about this many steps.
LEAN_STEPS = 8.0
# Mean sign above which surprises are taken for a change; chance alone passes it on about 2 % of steps.
LEAN_OF_CHANGE = 0.6
CATCH_UP_GAIN = 0.15
CATCH_UP_CLIP = 0.7
# Share of the newest step in the running time of "the last few": about fifteen of them.
RECENT_SHARE = 0.125


class OnlineCorrection:
    """Multiplicative correction of predicted step times.

    Args:
        time_constant_steps: steps after which an ordinary small drift is followed to 63 %; above 1.
        quantile: of measured / corrected prediction of recent steps together (:attr:`ratio_quantile`); in (0, 1).
        initial_ratio_quantile: where that quantile starts (from the profile's residuals).
        low, high: bounds of :attr:`factor`, around 1.
    """

    __slots__ = (
        "_centre",
        "_gain",
        "_high",
        "_lean",
        "_low",
        "_quantile",
        "_recent_measured_s",
        "_recent_predicted_s",
        "_recent_spread",
        "_spread",
        "_tail",
        "factor",
        "num_steps",
    )

    def __init__(
        self,
        *,
        time_constant_steps: float = 15.0,
        quantile: float = 0.9,
        initial_ratio_quantile: float = 1.1,
        low: float = 0.2,
        high: float = 5.0,
    ) -> None:
        if not time_constant_steps > 1.0 or not math.isfinite(time_constant_steps):
            raise InvalidFieldError("time_constant_steps", time_constant_steps, "a finite number above 1")
        if not 0.0 < quantile < 1.0:
            raise InvalidFieldError("quantile", quantile, "a number in (0, 1)")
        if not 0.0 < low <= 1.0 <= high < math.inf:
            raise InvalidFieldError("low, high", (low, high), "0 < low <= 1 <= high")
        if not 0.0 < initial_ratio_quantile < math.inf:
            raise InvalidFieldError("initial_ratio_quantile", initial_ratio_quantile, "a finite number above 0")
        self._gain = 1.0 / time_constant_steps
        self._quantile = quantile
        self._low = math.log(low)
        self._high = math.log(high)
        self._centre = 0.0
        self._spread = max(MIN_SPREAD, 0.5 * abs(math.log(initial_ratio_quantile)))
        self._tail = math.log(initial_ratio_quantile)
        self._recent_measured_s = self._recent_predicted_s = 0.0
        self._recent_spread = self._spread
        self._lean = 0.0
        self.factor = 1.0
        self.num_steps = 0

    @property
    def ratio_quantile(self) -> float:
        """Running quantile of measured / (factor * predicted), each summed over recent steps."""
        return math.exp(self._tail)

    def observe(self, shape: BatchShape, predicted_s: float, measured_s: float) -> None:
        """Learn from one executed step.

        Args:
            shape: what was in it; an empty step teaches nothing.
            predicted_s: the *uncorrected* prediction, seconds.
            measured_s: how long it took, seconds. Values that are not above 0 are ignored.
        """
        if shape.new_tokens <= 0 or not 0.0 < predicted_s < math.inf or not 0.0 < measured_s < math.inf:
            return
        self._learn_tail(predicted_s * self.factor, measured_s)
        surprise = math.log(measured_s / predicted_s) - self._centre
        size = surprise if surprise >= 0.0 else -surprise
        limit = CLIP_SPREADS * self._spread
        gain, bound = self._pace(surprise, limit)
        centre = self._centre + gain * (surprise if size <= bound else math.copysign(bound, surprise))
        self._centre = self._low if centre < self._low else self._high if centre > self._high else centre
        self.factor = math.exp(self._centre)
        # Clipped as the centre is: a stall must not widen the gate behind it.
        spread = self._spread + self._gain * ((size if size <= limit else limit) - self._spread)
        self._spread = spread if spread > MIN_SPREAD else MIN_SPREAD
        self.num_steps += 1

    def _pace(self, surprise: float, limit: float) -> tuple[float, float]:
        """Share of the surprise to move by and the size it is clipped to, from how one-sided recent steps were."""
        sign = 1.0 if surprise > 0.0 else -1.0 if surprise < 0.0 else 0.0
        self._lean += (sign - self._lean) / LEAN_STEPS
        lean = self._lean if self._lean >= 0.0 else -self._lean
        if lean <= LEAN_OF_CHANGE:
            return self._gain, limit
        urgency = (lean - LEAN_OF_CHANGE) / (1.0 - LEAN_OF_CHANGE)
        return self._gain + urgency * (CATCH_UP_GAIN - self._gain), limit + urgency * CATCH_UP_CLIP

    def _learn_tail(self, corrected_s: float, measured_s: float) -> None:
        """Move the quantile by how the recent steps together compare with what was said of each before it ran."""
        share = RECENT_SHARE if self.num_steps > 0 else 1.0
        self._recent_measured_s += share * (measured_s - self._recent_measured_s)
        self._recent_predicted_s += share * (corrected_s - self._recent_predicted_s)
        ratio = math.log(self._recent_measured_s / self._recent_predicted_s)
        size = min(abs(ratio), CLIP_SPREADS * self._recent_spread)
        self._recent_spread = max(MIN_SPREAD, self._recent_spread + self._gain * (size - self._recent_spread))
        step = 2.0 * self._gain * self._recent_spread
        self._tail += step * self._quantile if ratio > self._tail else -step * (1.0 - self._quantile)
