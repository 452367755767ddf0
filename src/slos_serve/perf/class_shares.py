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

from slos_serve.perf.jit import in_place

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
        self.boost = np.empty(len(self.boost))  # publications keep the one before
        count(classes, promised, weights, self._decided, self._promised, self._worth)
        boosts(self._decided, self._promised, self._worth, self._floor, self.boost)


@in_place
def count(
    classes: IntArray,
    kept: BoolArray,
    weights: FloatArray,
    decided: FloatArray,
    promised: FloatArray,
    worth: FloatArray,
) -> None:
    """Let older decisions fade and count these; arguments as of :meth:`ClassShares.decided` and :func:`boosts`."""
    fade = (1.0 - 1.0 / OVER_DECISIONS) ** len(classes)
    for own in range(len(decided)):
        decided[own] *= fade
        promised[own] *= fade
        worth[own] *= fade
    for j in range(len(classes)):
        decided[classes[j]] += 1.0
        promised[classes[j]] += 1.0 if kept[j] else 0.0
        worth[classes[j]] += weights[j]


@in_place
def boosts(decided: FloatArray, promised: FloatArray, worth: FloatArray, floor: float, boost: FloatArray) -> None:
    """Write what the weight of each class is multiplied with.

    Args:
        decided, promised, worth: float64 [classes], decisions of late, promises among them, weights of them.
        floor: least share, as a part of the mean.
        boost: float64 [classes], written.
    """
    for own in range(len(boost)):
        weight, count, kept = worth[own] / max(decided[own], 1e-12), 0.0, 0.0
        for other in range(len(boost)):
            if worth[other] / max(decided[other], 1e-12) <= ALIKE * weight:
                count += decided[other]
                kept += promised[other]
        mean = kept / max(count, 1e-12)
        share = (promised[own] + BEFORE * mean) / (decided[own] + BEFORE)
        below = floor * mean / share if share > 0.0 else 1.0
        boost[own] = min(max(below**POWER, 1.0), MOST)
