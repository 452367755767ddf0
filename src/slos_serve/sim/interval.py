"""Intervals that are true: one value a seed, each found without looking at the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Student's t at 97.5 %, by degrees of freedom.
_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_T_MANY = 2.23  # of ten degrees of freedom; a little too wide beyond


def _half_width(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Of the 95 % interval of a mean; 0 with one value."""
    if len(values) < 2:
        return 0.0
    return _T_95.get(len(values) - 1, _T_MANY) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t 95 % interval of the mean of one value a seed, not below 0; of no width with one seed."""
    centre, half = float(np.mean(values)), _half_width(values)
    return (max(centre - half, 0.0), centre + half)


def ratio_interval(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ours over others and its 95 % interval, seed by seed: the same requests on both sides."""
    logs = np.log(np.maximum(ours, 1e-9)) - np.log(np.maximum(others, 1e-9))
    centre, half = float(np.mean(logs)), _half_width(logs)
    return (math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def ratio_of_means(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ours over mean of others and its 95 % interval, seed by seed: for shares, of which a seed may have none.

    The interval is that of a ratio estimator, not below 0. All three are inf where others have none at all.
    """
    centre, mean = float(np.mean(ours)), float(np.mean(others))
    if mean <= 0.0:
        return (math.inf, math.inf, math.inf)
    over = centre / mean
    half = _half_width(np.asarray(ours) - over * np.asarray(others)) / mean
    return (over, max(over - half, 0.0), over + half)
