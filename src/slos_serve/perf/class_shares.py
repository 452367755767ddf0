"""Which classes, and which tenants in a class, are promised less than others, learnt, so that none is sacrificed.

Admission takes the set that is worth most, so in overload it declines what costs most for its weight: of classes of one
weight the one with the longest prompts. Here is counted, by class, which share of the requests decided of late was
promised what it asked for. A class whose share is below a floor, ``fairness`` times the mean, weighs
(floor / share) ** ``POWER`` times as much. While all are above it, weights are as they are given. Classes that weigh
more by themselves are not in a class's mean: that they win is what their weight says.

A tenant that sends more is promised more, at the others' expense. So tenants of a class are compared by an even part of
its promises instead of the mean: each is due as many as all others get, or all it asked for where that is less. The
same floor holds for what it is due. Where requests come of one tenant, or of none, nothing is counted by tenant.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.request import NUM_SHARES
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
    """Shares of requests that were promised what they asked for, by class, and by tenant where there are several.

    Args:
        num_classes: SLO classes that requests may belong to.
        fairness: the floor, as a part of the mean share; 0 for none.

    Attributes:
        boost: float64 [NUM_SHARES], what weights are multiplied with now, 1 or more; see
            :func:`slos_serve.core.request.share_of`.
    """

    def __init__(self, num_classes: int, fairness: float) -> None:
        self.boost: FloatArray = np.ones(NUM_SHARES)
        self._num_classes = min(max(num_classes, 1), NUM_SHARES)
        self._floor = fairness
        self._decided = np.zeros(self._num_classes)
        self._promised = np.zeros(self._num_classes)
        self._worth = np.zeros(self._num_classes)
        # Decisions and promises by share, float64 [NUM_SHARES]; ``None`` until a tenant has come.
        self._by_tenant: tuple[FloatArray, FloatArray] | None = None

    def decided(self, shares: IntArray, promised: BoolArray, weights: FloatArray) -> None:
        """Requests were promised their SLO, or can have it no more.

        Args:
            shares: of each.
            promised: whether it was.
            weights: as they were given.
        """
        if len(shares) == 0 or self._floor == 0.0:
            return
        if self._by_tenant is None and int(shares.max()) >= self._num_classes:
            self._by_tenant = np.zeros(NUM_SHARES), np.zeros(NUM_SHARES)
            self._by_tenant[0][: self._num_classes] = self._decided
            self._by_tenant[1][: self._num_classes] = self._promised
        boost = np.ones(NUM_SHARES)  # publications keep the one before
        count(shares, promised, weights, self._decided, self._promised, self._worth)
        boosts(self._decided, self._promised, self._worth, self._floor, boost)
        if self._by_tenant is not None:
            count_tenants(shares, promised, *self._by_tenant)
            boost_tenants(*self._by_tenant, self._num_classes, self._floor, boost)
        self.boost = boost


@in_place
def count(
    shares: IntArray,
    kept: BoolArray,
    weights: FloatArray,
    decided: FloatArray,
    promised: FloatArray,
    worth: FloatArray,
) -> None:
    """Let older decisions fade and count these; arguments as of :meth:`ClassShares.decided` and :func:`boosts`."""
    fade = (1.0 - 1.0 / OVER_DECISIONS) ** len(shares)
    for own in range(len(decided)):
        decided[own] *= fade
        promised[own] *= fade
        worth[own] *= fade
    for j in range(len(shares)):
        own = shares[j] % len(decided)
        decided[own] += 1.0
        promised[own] += 1.0 if kept[j] else 0.0
        worth[own] += weights[j]


@in_place
def boosts(decided: FloatArray, promised: FloatArray, worth: FloatArray, floor: float, boost: FloatArray) -> None:
    """Write what the weight of each class is multiplied with.

    Args:
        decided, promised, worth: float64 [classes], decisions of late, promises among them, weights of them.
        floor: least share, as a part of the mean.
        boost: float64 [classes or more], written.
    """
    for own in range(len(decided)):
        weight, asked, kept = worth[own] / max(decided[own], 1e-12), 0.0, 0.0
        for other in range(len(decided)):
            if worth[other] / max(decided[other], 1e-12) <= ALIKE * weight:
                asked += decided[other]
                kept += promised[other]
        boost[own] = _lift(decided[own], promised[own], kept / max(asked, 1e-12), floor)


@in_place
def count_tenants(shares: IntArray, kept: BoolArray, decided: FloatArray, promised: FloatArray) -> None:
    """Like :func:`count`, by share."""
    fade = (1.0 - 1.0 / OVER_DECISIONS) ** len(shares)
    for own in range(NUM_SHARES):
        decided[own] *= fade
        promised[own] *= fade
    for j in range(len(shares)):
        decided[shares[j]] += 1.0
        promised[shares[j]] += 1.0 if kept[j] else 0.0


@in_place
def boost_tenants(decided: FloatArray, promised: FloatArray, num_classes: int, floor: float, boost: FloatArray) -> None:
    """Write what the weight of each tenant in each class is multiplied with.

    Args:
        decided, promised: float64 [NUM_SHARES], decisions of late and promises among them.
        num_classes: classes; share ``c + k * num_classes`` is tenant k of class c.
        floor: least number of promises, as a part of what a tenant is due.
        boost: float64 [NUM_SHARES], of each class at its own place; written.
    """
    for class_index in range(num_classes):
        by_class, even = boost[class_index], _even_part(decided, promised, class_index, num_classes)
        for own in range(class_index, NUM_SHARES, num_classes):
            due = min(even / max(decided[own], 1e-12), 1.0)
            boost[own] = min(by_class * _lift(decided[own], promised[own], due, floor), MOST)


@in_place
def _lift(decided: float, promised: float, due: float, floor: float) -> float:
    """What a weight is multiplied with where ``due`` of the requests decided ought to be promised."""
    share = (promised + BEFORE * due) / (decided + BEFORE)
    below = floor * due / share if share > 0.0 else 1.0
    return float(min(max(below**POWER, 1.0), MOST))


@in_place
def _even_part(decided: FloatArray, promised: FloatArray, class_index: int, num_classes: int) -> float:
    """Promises that each tenant of a class is due, if it asks for as many: all have them, or what they ask for."""
    level, total = 0.0, 0.0
    for own in range(class_index, NUM_SHARES, num_classes):
        total += promised[own]
    while True:
        left, others = total, 0
        for own in range(class_index, NUM_SHARES, num_classes):
            if decided[own] <= level:
                left -= decided[own]
            else:
                others += 1
        if others == 0 or left / others <= level:
            return float(level)
        level = left / others
