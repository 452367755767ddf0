"""How likely a draft token is right, learnt per class from what verifications accepted.

A verification of d drafts that accepts k of them saw k successes and, when k < d, one failure: under a geometric
process that is all there is to know. Counts decay with the drafts tested, a weak prior stands in at first, and plans
are made at a lower confidence bound: a class that has hardly been seen is trusted less than its mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HALF_LIFE_DRAFTS = 2000.0
PRIOR_MEAN = 0.6
PRIOR_DRAFTS = 4.0
MAX_ACCEPTANCE = 0.99


class AcceptanceEstimate:
    """Decaying successes and failures of each class.

    Args:
        num_classes: rows to keep.
        confidence: standard deviations of the estimate that :meth:`lower` stays below its mean.
    """

    def __init__(self, num_classes: int, confidence: float = 1.0) -> None:
        self._confidence = confidence
        prior = PRIOR_DRAFTS * np.array([PRIOR_MEAN, 1.0 - PRIOR_MEAN])
        self._counts: NDArray[np.float64] = np.tile(prior, (num_classes, 1))
        self._lower = np.empty(num_classes)
        self._refresh()

    def observe(self, class_index: NDArray[np.int64], drafted: NDArray[np.int64], accepted: NDArray[np.int64]) -> None:
        """Learn from the verifications of one step: int64 [n] each; entries without drafts count for nothing.

        Leave out a verification in which the answer ended: what came after its end was never tested.
        """
        if len(drafted) == 0:
            return
        failed = (accepted < drafted).astype(np.float64)
        size = len(self._counts)
        successes = np.bincount(class_index, weights=accepted, minlength=size)
        failures = np.bincount(class_index, weights=failed, minlength=size)
        self._counts *= (0.5 ** ((successes + failures) / HALF_LIFE_DRAFTS))[:, None]
        self._counts += np.stack((successes, failures), axis=1)
        self._refresh()

    def _refresh(self) -> None:
        total = self._counts.sum(axis=1)
        mean = self._counts[:, 0] / total
        spread = np.sqrt(mean * (1.0 - mean) / (total + 1.0))
        self._lower = np.clip(mean - self._confidence * spread, 0.0, MAX_ACCEPTANCE)

    def mean(self) -> NDArray[np.float64]:
        """float64 [num_classes], share of tested drafts that were right."""
        return np.asarray(self._counts[:, 0] / self._counts.sum(axis=1))

    def lower(self) -> NDArray[np.float64]:
        """float64 [num_classes], the bound to plan with, 0 to ``MAX_ACCEPTANCE``."""
        return self._lower
