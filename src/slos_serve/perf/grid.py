"""Which batches a profile measures: decodes alone, prefill alone and mixtures, over the sizes an engine will see.

One pass visits every point once in random order, so that a slow spell of the machine does not line up with one shape.
Sizes are drawn inside strata rather than fixed: a step that falls between two cached kernel shapes then shows in the
samples as often as it will in service. Large prefills are few, because one costs as much as many small batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slos_serve.core.errors import InvalidFieldError

SMALLEST_CHUNK = 16
# Above this many prefill tokens a point is measured beside no decodes and beside one random number of them only.
SMALL_PREFILL = 512
# On a slow engine one large prefill takes as long as a dozen of the batches that serving is made of.
LARGE_EVERY = 4


@dataclass(frozen=True, slots=True)
class GridPoint:
    """A batch to measure: so many running requests decode, so many prefill tokens join them."""

    decodes: int
    prefill_tokens: int


def grid_pass(max_decodes: int, max_num_batched_tokens: int, rng: np.random.Generator) -> list[GridPoint]:
    """One pass over the grid, sizes drawn within their strata, in random order.

    Args:
        max_decodes: most requests that decode in one batch, at least 1.
        max_num_batched_tokens: most tokens the engine puts in one batch.
        rng: draws sizes and order.

    Raises:
        InvalidFieldError: a bound is below 1.
    """
    for name, bound in (("max_decodes", max_decodes), ("max_num_batched_tokens", max_num_batched_tokens)):
        if bound < 1:
            raise InvalidFieldError(name, bound, "a whole number, 1 or more")
    largest = min(max_decodes, max_num_batched_tokens)
    points = [GridPoint(decodes, 0) for decodes in _decode_strata(largest, rng)]
    for low, high in itertools.pairwise(_chunk_edges(max_num_batched_tokens)):
        beside = [0, 1, int(rng.integers(1, largest + 1)), int(rng.integers(1, largest + 1))]
        for decodes in beside if high <= SMALL_PREFILL else [0, beside[-1]]:
            chunk = math.floor(math.exp(rng.uniform(math.log(low), math.log(high))) + 0.5)
            room = max_num_batched_tokens - decodes
            if room > 0:
                points.append(GridPoint(decodes, min(chunk, room)))
    return [points[i] for i in rng.permutation(len(points))]


def grid_points(max_decodes: int, max_num_batched_tokens: int, rng: np.random.Generator) -> Iterator[GridPoint]:
    """Passes without end; large prefills are in one pass of :data:`LARGE_EVERY`, the first among them."""
    for number in itertools.count():
        points = grid_pass(max_decodes, max_num_batched_tokens, rng)
        everything = number % LARGE_EVERY == 0
        yield from (point for point in points if everything or point.prefill_tokens <= SMALL_PREFILL)


def _decode_strata(largest: int, rng: np.random.Generator) -> list[int]:
    """1, 2, 3, 4, then one draw from each stretch that grows by half, then the largest."""
    counts = [count for count in (1, 2, 3, 4) if count <= largest]
    low = 5
    while low <= largest:
        high = min(low + low // 2, largest)
        counts.append(int(rng.integers(low, high + 1)))
        low = high + 1
    return [*counts, largest] if largest > 4 else counts


def _chunk_edges(max_num_batched_tokens: int) -> list[int]:
    """Powers of two from :data:`SMALLEST_CHUNK`, ended by the engine's own bound."""
    edges = []
    edge = SMALLEST_CHUNK
    while edge < max_num_batched_tokens:
        edges.append(edge)
        edge *= 2
    return [*edges, max_num_batched_tokens] if edges else [max_num_batched_tokens] * 2
