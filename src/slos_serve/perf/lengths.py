"""How long answers will be, learnt per class while serving. No oracle: only finished requests are seen.

Lengths fall into geometric bins; each class keeps decaying counts. The forecast for a request that has generated ``g``
tokens is a quantile of the lengths beyond ``g`` (survival), capped by ``max_tokens``. A weak prior stands in until
enough answers of the class have been seen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.jit import in_place

FloatArray = NDArray[np.float64]
NUM_BINS = 96
FIRST_EDGE = 4.0
GROWTH = 1.1
PRIOR_LENGTH_TOKENS = 256.0
PRIOR_SPREAD = 1.2  # standard deviation of log length
PRIOR_WEIGHT = 8.0


def bin_edges() -> NDArray[np.float64]:
    """float64 [NUM_BINS], upper edge of each bin in tokens; the last is open."""
    edges = FIRST_EDGE * GROWTH ** np.arange(NUM_BINS)
    return np.asarray(np.maximum(np.ceil(edges), np.arange(1, NUM_BINS + 1) + FIRST_EDGE - 1), dtype=np.float64)


EDGES = bin_edges()
# For kernels that ask for every request at several moments: the bin of every short length, in bytes so that the table
# stays in the processor's nearest cache; and by how much of each bin a token is.
_BIN_OF = np.searchsorted(EDGES, np.arange(4096.0)).astype(np.uint8)
_PER_TOKEN = 1.0 / np.diff(EDGES, prepend=0.0)


@in_place
def bin_of(tokens: float) -> int:
    """First bin whose upper edge is at or above ``tokens``; ``NUM_BINS`` past the last."""
    at = int(np.ceil(tokens))
    if at < len(_BIN_OF):
        return int(_BIN_OF[max(at, 0)])
    return int(np.searchsorted(EDGES, tokens))


@in_place
def survives(survival: FloatArray, tokens: float) -> float:
    """Share of answers of a class longer than ``tokens``, linear within a bin."""
    at = bin_of(tokens)
    if at >= NUM_BINS:
        return 0.0
    low = EDGES[at - 1] if at > 0 else 0.0
    part = (tokens - low) * _PER_TOKEN[at]
    return float(survival[at] + part * (survival[at + 1] - survival[at]))


@in_place
def share_left(rows: RequestArray, slot: int, more: float, so_far: float, survival: FloatArray) -> float:
    """Probability that a request generates ``more`` tokens after those it has; ``so_far``: :func:`survives` of those.

    A client's hint is taken at its word while it holds. Past every length seen, half as much again is expected.
    """
    generated = float(rows["output_tokens"][slot])
    total = generated + more
    if total >= rows["max_tokens"][slot]:
        return 0.0
    if rows["hint_tokens"][slot] > generated:
        return 1.0 if total < rows["hint_tokens"][slot] else 0.0
    if so_far <= 1e-6:
        return 1.0 if more < 0.5 * generated else 0.0
    return survives(survival, total) / so_far


@in_place
def forecast_lengths(rows: RequestArray, slots: SlotArray, table: FloatArray) -> None:
    """Write ``expected_tokens`` of each slot: its class's conditional quantile, or the client's hint while it holds.

    Args:
        table: float64 [classes, bins], see :meth:`LengthForecast.table`; fewer bins are the first ones.
    """
    for slot in slots:
        generated, hint = rows["output_tokens"][slot], rows["hint_tokens"][slot]
        if hint > generated:
            expected = float(hint)
        else:
            at = min(bin_of(float(generated)), table.shape[1] - 1)
            expected = max(float(table[rows["class_index"][slot], at]), float(generated + 1))
        rows["expected_tokens"][slot] = int(min(expected, float(rows["max_tokens"][slot])))


class LengthForecast:
    """Decaying histograms of output lengths by class, and their conditional quantiles.

    Args:
        num_classes: rows to keep.
        quantile: which quantile of the remaining distribution :meth:`table` holds.
        half_life: answers of a class after which an old one counts half.
    """

    def __init__(self, num_classes: int, quantile: float = 0.7, half_life: float = 500.0) -> None:
        if not 0.0 < quantile < 1.0:
            raise InvalidFieldError("length_quantile", quantile, "a number in (0, 1)")
        self._quantile = quantile
        self._decay = 0.5 ** (1.0 / half_life)
        self._counts = np.tile(_prior(), (num_classes, 1))
        self._table = np.empty((num_classes, NUM_BINS), dtype=np.float64)
        self._survival = np.zeros((num_classes, NUM_BINS + 1), dtype=np.float64)
        self._stale = set(range(num_classes))
        self._seen_since = np.zeros(num_classes, dtype=np.int64)

    def observe(self, class_index: int, output_tokens: int) -> None:
        """Learn from an answer that ended by itself."""
        row = self._counts[class_index]
        row *= self._decay
        row[min(int(np.searchsorted(EDGES, output_tokens)), NUM_BINS - 1)] += 1.0
        self._seen_since[class_index] += 1
        # Refreshing the table costs more than an observation, and one answer in many hardly moves a quantile.
        if self._seen_since[class_index] >= min(8.0, 0.02 * row.sum()):
            self._stale.add(class_index)

    def table(self) -> NDArray[np.float64]:
        """float64 [num_classes, NUM_BINS]: forecast total length given the bin of the tokens generated so far."""
        self._refresh()
        return self._table

    def survival(self) -> NDArray[np.float64]:
        """float64 [num_classes, NUM_BINS + 1]: share of answers that reach bin b; the last column is 0."""
        self._refresh()
        return self._survival

    def _refresh(self) -> None:
        for class_index in self._stale:
            counts = self._counts[class_index]
            self._table[class_index] = conditional_quantiles(counts, self._quantile)
            self._survival[class_index, :NUM_BINS] = np.cumsum(counts[::-1])[::-1] / counts.sum()
            self._seen_since[class_index] = 0
        self._stale.clear()


def conditional_quantiles(counts: NDArray[np.float64], quantile: float) -> NDArray[np.float64]:
    """float64 [NUM_BINS]: for each bin b, the ``quantile`` of lengths given that they reach bin b.

    Past the longest length seen, half as much again is expected.
    """
    survival = np.append(np.cumsum(counts[::-1])[::-1], 0.0)
    # The first bin at whose end at most this share of those that reach bin b survives.
    at = np.searchsorted(-survival[1:], -survival[:-1] * (1.0 - quantile))
    found = EDGES[np.minimum(at, NUM_BINS - 1)]
    return np.where(survival[:-1] <= 1e-9 * survival[0], 1.5 * EDGES, found)


def _prior() -> NDArray[np.float64]:
    log_edges = np.log(EDGES)
    density = np.exp(-0.5 * ((log_edges - np.log(PRIOR_LENGTH_TOKENS)) / PRIOR_SPREAD) ** 2)
    density[1:] *= np.diff(log_edges)
    density[0] *= log_edges[1] - log_edges[0]
    return np.asarray(PRIOR_WEIGHT * density / density.sum())
