"""What stands between the batch-time model and a step."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.sim.conditions import AS_SERVED, EXACT, Conditions
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.model_error import ModelError, Spells, StepFactors
from tests.sim_builders import LIMITS, PLAIN, token_times, workload


def test_exact_changes_nothing() -> None:
    settings = SimSettings(policy="vllm", seed=3)
    assert EXACT.on(settings) == settings


def test_scheduling_takes_its_time_in_every_step() -> None:
    settings = Conditions(scheduling_s=0.002).on(SimSettings(policy="vllm"))
    recording = simulate(workload([5.0], [100], [3]), PLAIN, LIMITS, settings)
    assert token_times(recording, 0) == [0.022, 0.0341, 0.0462]


def test_a_server_is_slower_than_its_model_and_varies() -> None:
    settings = AS_SERVED.on(SimSettings(policy="vllm"))
    recording = simulate(workload([0.0], [10], [600]), PLAIN, LIMITS, settings)
    took = np.diff(token_times(recording, 0))
    assert took.mean() == pytest.approx(0.0101 + 0.002, rel=0.05)
    assert took.std() == pytest.approx(0.1 * 0.0101, rel=0.2)


def test_slow_spells_come_as_often_and_last_as_long_as_asked_for() -> None:
    error = ModelError(spell_every_s=100.0, spell_s=5.0, spell_factor=1.5)
    factors = StepFactors(error, 1, 0)
    drawn = np.array([factors.duration_s(0.05 * i, 1.0) for i in range(400_000)])
    assert sorted(set(drawn)) == [1.0, 1.5]
    assert (drawn == 1.5).mean() == pytest.approx(5.0 / 105.0, rel=0.25)
    begun = int((np.diff(drawn) > 0).sum())
    assert begun == pytest.approx(400_000 * 0.05 / 105.0, rel=0.25)
    again = StepFactors(error, 1, 0)
    assert again.duration_s(0.05 * 399_999, 1.0) == drawn[-1]  # time alone decides, not how often it was asked


def test_slow_spells_are_not_drawn_through_a_silence_of_ages() -> None:
    error = ModelError(spell_every_s=100.0, spell_s=5.0, spell_factor=1.5)
    random = _Counting(np.random.default_rng(0))
    spells = Spells(error, random)  # type: ignore[arg-type]
    assert spells.factor(1e12) in (1.0, 1.5)
    assert random.drawn < 1000
    drawn = np.array([spells.factor(1e12 + 0.05 * i) for i in range(400_000)])
    assert (drawn == 1.5).mean() == pytest.approx(5.0 / 105.0, rel=0.25)


class _Counting:
    """A generator that counts what is drawn, and ends the test where that would never end."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self.drawn = 0

    def exponential(self, scale: float) -> float:
        self.drawn += 1
        assert self.drawn < 100_000
        return float(self._random.exponential(scale))


def test_impossible_conditions_are_named() -> None:
    with pytest.raises(InvalidFieldError, match="scheduling_s"):
        Conditions(scheduling_s=-1.0)
    with pytest.raises(InvalidFieldError, match="spell_factor"):
        Conditions(spell_factor=0.0).on(SimSettings())
