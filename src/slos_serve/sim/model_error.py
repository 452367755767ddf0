"""How far real step times stray from the batch-time model: noise, bias, stragglers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from slos_serve.core.slo import check_number

_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class ModelError:
    """Injected error; the neutral one is exact.

    Attributes:
        bias: every step takes this multiple of what the model says.
        noise: coefficient of variation of a log-normal factor on each step, mean 1.
        straggler_probability, straggler_factor: now and then a step takes this multiple.
    """

    bias: float = 1.0
    noise: float = 0.0
    straggler_probability: float = 0.0
    straggler_factor: float = 4.0

    def __post_init__(self) -> None:
        check_number("bias", self.bias, low=0.0, high=100.0)
        check_number("noise", self.noise, low=0.0, high=5.0, low_included=True)
        check_number("straggler_probability", self.straggler_probability, low=0.0, high=1.0, low_included=True)
        check_number("straggler_factor", self.straggler_factor, low=0.0, high=1000.0)

    @property
    def exact(self) -> bool:
        """The model is right about every step."""
        return self.bias == 1.0 and self.noise == 0.0 and self.straggler_probability == 0.0


class StepFactors:
    """The factors of one replica's steps, drawn in blocks from its own stream."""

    def __init__(self, error: ModelError, seed: int, replica: int) -> None:
        self._error = error
        self._random = np.random.default_rng((seed, replica, 0x5E7))
        self._block = np.empty(0)
        self._next = 0

    def draw(self) -> float:
        """Factor of the next step."""
        if self._error.exact:
            return 1.0
        if self._next == len(self._block):
            self._block = self._draw_block()
            self._next = 0
        self._next += 1
        return float(self._block[self._next - 1])

    def _draw_block(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        error = self._error
        sigma = math.sqrt(math.log1p(error.noise * error.noise))
        factors = error.bias * np.exp(sigma * self._random.standard_normal(_BLOCK) - 0.5 * sigma * sigma)
        slow = self._random.random(_BLOCK) < error.straggler_probability
        return np.asarray(np.where(slow, factors * error.straggler_factor, factors))
