"""Prompt and output lengths drawn from shipped quantile tables.

A table holds the quantiles of each column and the rank correlations between columns; a draw is a Gaussian copula with
those correlations, read off through the quantiles. Means and tails of the source are kept; nothing else of it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtr

from slos_serve.core.errors import InvalidFieldError

# Denser in the tails, where a linear interpolation would bend the mean.
PROBABILITIES = np.concatenate((np.linspace(0.0, 0.99, 100), np.array([0.9925, 0.995, 0.9975, 0.999, 0.9995, 1.0])))


@dataclass(frozen=True)
class LengthTable:
    """Quantiles of the columns of one table.

    Attributes:
        columns: names, in the order of the rows of ``correlation``.
        quantiles: column -> float64 at :data:`PROBABILITIES`.
        correlation: float64 [columns, columns], rank correlations.
    """

    columns: tuple[str, ...]
    quantiles: dict[str, NDArray[np.float64]]
    correlation: NDArray[np.float64]

    def draw(self, count: int, random: Generator) -> dict[str, NDArray[np.int64]]:
        """``count`` rows, each column at least 1."""
        # A rank correlation r belongs to a normal correlation of 2 sin(pi r / 6).
        normal_correlation = 2.0 * np.sin(np.pi * self.correlation / 6.0)
        np.fill_diagonal(normal_correlation, 1.0)
        factor = np.linalg.cholesky(normal_correlation)
        ranks = ndtr(random.standard_normal((count, len(self.columns))) @ factor.T)
        return {
            name: np.maximum(np.rint(np.interp(ranks[:, i], PROBABILITIES, self.quantiles[name])), 1).astype(np.int64)
            for i, name in enumerate(self.columns)
        }


def load_table(name: str) -> dict[str, Any]:
    """A shipped table as parsed JSON.

    Raises:
        InvalidFieldError: no such table.
    """
    file = resources.files("slos_serve.workload") / "tables" / f"{name}.json"
    if not file.is_file():
        raise InvalidFieldError("table", name, "a table shipped in slos_serve/workload/tables")
    table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return table


@cache
def length_table(name: str) -> LengthTable:
    """A shipped length table."""
    table = load_table(name)
    columns = tuple(table["columns"])
    quantiles = {column: np.asarray(table["quantiles"][column], dtype=np.float64) for column in columns}
    return LengthTable(columns, quantiles, np.asarray(table["rank_correlation"], dtype=np.float64))
