"""How far real step times stray from the model: noise, bias, stragglers, slow spells, a machine that is taken away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slos_serve.core.slo import check_number

_BLOCK = 4096
# Without a step for this many spells, only the last few of them are drawn: a trace may be silent for a thousand years.
_SPELLS_APART, _SPELLS_BEFORE = 1_000_000, 100


# However much is taken away, this part of the time stays: the clock must go on.
_LEAST_LEFT = 0.05


class Interruptions:
    """Time during which the machine did something else, as a virtual machine's processors are taken away.

    Args:
        times_s: rising moments.
        lost_s: seconds lost up to each of them.
    """

    def __init__(self, times_s: Sequence[float], lost_s: Sequence[float]) -> None:
        times = np.asarray(times_s, dtype=np.float64)
        widths = np.diff(times)
        lost = np.minimum(np.diff(np.asarray(lost_s, dtype=np.float64)), (1.0 - _LEAST_LEFT) * widths)
        self._times = times
        self._left = np.concatenate((np.zeros(1), np.cumsum(widths - lost)))

    @property
    def lost_s(self) -> float:
        """Seconds lost in all."""
        return float(self._times[-1] - self._times[0] - self._left[-1])

    def duration_s(self, start_s: float, work_s: float) -> float:
        """How long ``work_s`` of machine time takes from ``start_s`` on; nothing is lost outside the moments known."""
        begin = self._left_at(start_s)
        return max(self._time_of(begin + work_s) - start_s, work_s)

    def _left_at(self, time_s: float) -> float:
        first, last = float(self._times[0]), float(self._times[-1])
        outside = min(time_s - first, 0.0) + max(time_s - last, 0.0)
        return float(np.interp(time_s, self._times, self._left)) + outside

    def _time_of(self, left_s: float) -> float:
        outside = min(left_s, 0.0) + max(left_s - float(self._left[-1]), 0.0)
        return float(np.interp(left_s, self._left, self._times)) + outside


@dataclass(frozen=True, slots=True)
class ModelError:
    """Injected error; the neutral one is exact.

    Attributes:
        bias: every step takes this multiple of what the model says.
        noise: coefficient of variation of a log-normal factor on each step, mean 1.
        straggler_probability, straggler_factor: now and then a step takes this multiple.
        spell_every_s, spell_s, spell_factor: a slow spell begins this often on average (0: never), lasts that long on
            average, both exponential, and steps that begin in it take this multiple.
        interruptions: when the machine was elsewhere; the work of a step takes that much longer.
    """

    bias: float = 1.0
    noise: float = 0.0
    straggler_probability: float = 0.0
    straggler_factor: float = 4.0
    spell_every_s: float = 0.0
    spell_s: float = 0.0
    spell_factor: float = 1.0
    interruptions: Interruptions | None = None

    def __post_init__(self) -> None:
        check_number("bias", self.bias, low=0.0, high=100.0)
        check_number("noise", self.noise, low=0.0, high=5.0, low_included=True)
        check_number("straggler_probability", self.straggler_probability, low=0.0, high=1.0, low_included=True)
        check_number("straggler_factor", self.straggler_factor, low=0.0, high=1000.0)
        check_number("spell_every_s", self.spell_every_s, low=0.0, high=1e9, low_included=True)
        check_number("spell_s", self.spell_s, low=0.0, high=1e6, low_included=True)
        check_number("spell_factor", self.spell_factor, low=0.0, high=1000.0)

    @property
    def exact(self) -> bool:
        """The model is right about every step's work, slow spells aside."""
        return self.bias == 1.0 and self.noise == 0.0 and self.straggler_probability == 0.0


class Spells:
    """Slow spells of one replica; they depend on time alone, so every policy meets the same ones."""

    def __init__(self, error: ModelError, random: np.random.Generator) -> None:
        self._error = error
        self._random = random
        self._begin_s = self._end_s = math.inf
        if error.spell_every_s > 0.0 and error.spell_s > 0.0:
            self._end_s = 0.0
            self._next()

    def _next(self) -> None:
        self._begin_s = self._end_s + float(self._random.exponential(self._error.spell_every_s))
        self._end_s = self._begin_s + float(self._random.exponential(self._error.spell_s))

    def factor(self, start_s: float) -> float:
        """Multiple of a step that begins at ``start_s``; calls come in order of time."""
        if start_s > self._end_s + _SPELLS_APART * (self._error.spell_every_s + self._error.spell_s):
            # Exponential times have no memory: after so long a silence, spells may as well begin anew shortly before.
            self._end_s = start_s - _SPELLS_BEFORE * (self._error.spell_every_s + self._error.spell_s)
        while start_s >= self._end_s:
            self._next()
        return self._error.spell_factor if start_s >= self._begin_s else 1.0


class StepFactors:
    """The factors of one replica's steps, drawn in blocks from its own stream."""

    def __init__(self, error: ModelError, seed: int, replica: int) -> None:
        self._error = error
        self._random = np.random.default_rng((seed, replica, 0x5E7))
        self._block = np.empty(0)
        self._next = 0
        self._spells = Spells(error, np.random.default_rng((seed, replica, 0x51)))

    def duration_s(self, start_s: float, predicted_s: float) -> float:
        """How long a step that begins at ``start_s`` and for which the model says ``predicted_s`` takes."""
        work_s = predicted_s * self.draw() * self._spells.factor(start_s)
        gaps = self._error.interruptions
        return work_s if gaps is None else gaps.duration_s(start_s, work_s)

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
