"""What stands between the batch-time model and a step."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.sim.conditions import AS_SERVED, EXACT, Conditions
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.model_error import ModelError, StepFactors
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


def test_impossible_conditions_are_named() -> None:
    with pytest.raises(InvalidFieldError, match="scheduling_s"):
        Conditions(scheduling_s=-1.0)
    with pytest.raises(InvalidFieldError, match="spell_factor"):
        Conditions(spell_factor=0.0).on(SimSettings())
