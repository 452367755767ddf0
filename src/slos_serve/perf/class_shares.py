"""Which classes are promised less than others, learnt, so that no class is sacrificed.

Admission takes the set that is worth most, so in overload it declines what costs most for its weight: of classes of one
weight the one with the longest prompts. Here is counted, by class, which share of the requests decided of late was
promised what it asked for. A class whose share is below a floor, ``fairness`` times the mean, weighs
(floor / share) ** ``POWER`` times as much. While all are above it, weights are as they are given. Classes that weigh
more by themselves are not in a class's mean: that they win is what their weight says.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Decisions that the shares are of, about; and decisions at the mean that each class begins with.
OVER_DECISIONS, BEFORE = 128.0, 2.0
# A class of at most this many times the weight is in the mean.
ALIKE = 1.5
# How fast weights grow below the floor, and the most that one is multiplied with.
POWER, MOST = 4.0, 64.0


class ClassShares:
    """Shares of requests that were promised what they asked for, by class.

    Args:
        num_classes: SLO classes that requests may belong to.
        fairness: the floor, as a part of the mean share; 0 for none.

    Attributes:
        boost: float64 [classes], what weights are multiplied with now, 1 or more.
    """

    def __init__(self, num_classes: int, fairness: float) -> None:
        self.boost: FloatArray = np.ones(num_classes)
        self._floor = fairness
        self._decided = np.zeros(num_classes)
        self._promised = np.zeros(num_classes)
        self._worth = np.zeros(num_classes)

    def decided(self, classes: IntArray, promised: BoolArray, weights: FloatArray) -> None:
        """Requests were promised their SLO, or can have it no more.

        Args:
            classes: of each.
            promised: whether it was.
            weights: as they were given.
        """
        if len(classes) == 0 or self._floor == 0.0:
            return
        keep, num_classes = (1.0 - 1.0 / OVER_DECISIONS) ** len(classes), len(self.boost)
        self._decided = keep * self._decided + np.bincount(classes, minlength=num_classes)
        self._promised = keep * self._promised + np.bincount(classes[promised], minlength=num_classes)
        self._worth = keep * self._worth + np.bincount(classes, weights, minlength=num_classes)
        weight = self._worth / np.maximum(self._decided, 1e-12)
        alike = weight[None, :] <= ALIKE * weight[:, None]
        mean = (alike @ self._promised) / np.maximum(alike @ self._decided, 1e-12)
        share = (self._promised + BEFORE * mean) / (self._decided + BEFORE)
        below = np.divide(self._floor * mean, share, out=np.ones(num_classes), where=share > 0.0)
        self.boost = np.clip(below**POWER, 1.0, MOST)
