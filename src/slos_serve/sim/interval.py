"""Intervals that are true: one value a seed, each found without looking at the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Student's t at 97.5 %, by degrees of freedom.
_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_T_MANY = 2.23  # of ten degrees of freedom; a little too wide beyond


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t 95 % interval of the mean of one value a seed, not below 0; of no width with one seed."""
    centre = float(np.mean(values))
    if len(values) < 2:
        return (centre, centre)
    half = _T_95.get(len(values) - 1, _T_MANY) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return (max(centre - half, 0.0), centre + half)


def ratio_interval(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ours over others and its 95 % interval, seed by seed: the same requests on both sides."""
    logs = np.log(np.maximum(ours, 1e-9)) - np.log(np.maximum(others, 1e-9))
    centre = float(np.mean(logs))
    half = 0.0
    if len(logs) > 1:
        half = _T_95.get(len(logs) - 1, _T_MANY) * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return (math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def ratio_of_means(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ours over mean of others and its 95 % interval, seed by seed: for shares, of which a seed may have none.

    The interval is that of a ratio estimator, not below 0. All three are inf where others have none at all.
    """
    centre, mean = float(np.mean(ours)), float(np.mean(others))
    if mean <= 0.0:
        return (math.inf, math.inf, math.inf)
    over, half = centre / mean, 0.0
    if len(ours) > 1:
        left = np.asarray(ours) - over * np.asarray(others)
        half = _T_95.get(len(ours) - 1, _T_MANY) * float(np.std(left, ddof=1)) / math.sqrt(len(ours)) / mean
    return (over, max(over - half, 0.0), over + half)
