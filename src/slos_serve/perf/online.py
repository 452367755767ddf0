"""Keeps the batch-time model right while it serves: follows drift, ignores stalls, knows its own spread.

Two things are learnt from each executed step, both as the log of measured / predicted:

* a centre, whose exponential is :attr:`OnlineCorrection.factor`. A step moves it by a share of the surprise, and the
  surprise is clipped to a few times the usual spread, so a single stall counts for little more than an ordinary slow
  step. The signs of recent surprises are averaged: when nearly all lean to one side they are a change, not noise, and
  the share and the clip widen until the centre has caught up and the signs mix again.
* a high quantile of what is left after the correction, over the last few steps together rather than one by one: the
  mean size of their running mean, times what a normal distribution has at that quantile. A promise takes many steps:
  slow ones that come alone even out within it, slow spells do not, and the mean of a few steps in a row tells the two
  apart. Each step is clipped to a few spreads before it counts, and what is known fades within seconds, so that one
  stall of ten seconds costs the next plans a few per cent, and soon nothing.

O(1), scalar floats only: it runs before every batch.
"""

from __future__ import annotations

import math
from statistics import NormalDist

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
# Share of the newest step in the running mean of "the last few": about fifteen of them.
RECENT_SHARE = 0.125
# Spreads that one step is clipped to before it counts in that mean.
TAIL_CLIP_SPREADS = 4.0
# What is known of that mean's size fades over this much time of steps, and over this many steps at least.
TAIL_OVER_S, TAIL_OVER_STEPS = 10.0, 50.0
# A normal variable's standard deviation over its mean size.
_SIGMA_OF_SIZE = math.sqrt(math.pi / 2.0)


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
        "_recent",
        "_size",
        "_spread",
        "_z",
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
        self._z = max(NormalDist().inv_cdf(quantile), 0.0) * _SIGMA_OF_SIZE
        self._low = math.log(low)
        self._high = math.log(high)
        self._centre = 0.0
        self._spread = max(MIN_SPREAD, 0.5 * abs(math.log(initial_ratio_quantile)))
        # Mean size of the running mean, from the margin to start with.
        self._size = max(math.log(initial_ratio_quantile), 0.0) / self._z if self._z > 0.0 else 0.0
        self._recent = 0.0
        self._lean = 0.0
        self.factor = 1.0
        self.num_steps = 0

    @property
    def ratio_quantile(self) -> float:
        """Running quantile of measured / (factor * predicted) over recent steps together."""
        return math.exp(self._z * self._size)

    @property
    def one_step_quantile(self) -> float:
        """The same quantile of a single step, which nothing evens out; a little low, since no step counts in full."""
        return math.exp(self._z * self._spread)

    def observe(self, shape: BatchShape, predicted_s: float, measured_s: float) -> None:
        """Learn from one executed step.

        Args:
            shape: what was in it; an empty step teaches nothing.
            predicted_s: the *uncorrected* prediction, seconds.
            measured_s: how long it took, seconds. Values that are not above 0 are ignored.
        """
        if shape.new_tokens <= 0 or not 0.0 < predicted_s < math.inf or not 0.0 < measured_s < math.inf:
            return
        surprise = math.log(measured_s / predicted_s) - self._centre
        self._learn_tail(surprise, predicted_s * self.factor)
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

    def _learn_tail(self, surprise: float, corrected_s: float) -> None:
        """Learn how far the mean of recent steps strays; a step counts for its predicted time, a stall for no more."""
        bound = TAIL_CLIP_SPREADS * self._spread
        self._recent += RECENT_SHARE * (min(max(surprise, -bound), bound) - self._recent)
        share = min(corrected_s / TAIL_OVER_S, 1.0 / TAIL_OVER_STEPS)
        self._size += share * (abs(self._recent) - self._size)
