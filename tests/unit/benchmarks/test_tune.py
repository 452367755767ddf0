"""Tuning: the same budget for everybody, nothing of the tables, and what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tune
from slos_serve.core.errors import InvalidFieldError
from slos_serve.policies.registry import POLICIES, make_policy
from slos_serve.sim.sweep import AnswerFile
from tests.sim_builders import PLAIN


def setup(**changed: object) -> tune.Setup:
    fields = {"trials": 2, "profile": "opt-13b-a100", "scenarios": ("chat",), "loads": (1.0,), "seeds": (0,)}
    return tune.Setup(**{**fields, "requests": 20, **changed})  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize("changed", [{"seeds": (0, 22)}, {"seeds": ()}, {"profile": "llama-2-7b-h100"}])
def test_what_tables_use_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidFieldError, match="tuning"):
        setup(**changed)


def test_the_command_refuses_it_too(tmp_path: Path) -> None:
    output = tmp_path / "tuned.json"
    with pytest.raises(InvalidFieldError, match="seeds"):
        tune.main(["--seeds", "23", "--policy", "vllm", "--output", str(output)])
    assert not output.exists()


def test_every_policy_with_anything_to_choose_is_tuned() -> None:
    assert set(tune.SPACES) == set(POLICIES) - {"distserve"}


@pytest.mark.parametrize("policy", tune.SPACES)
def test_each_gets_the_same_number_of_distinct_trials_its_default_first(policy: str) -> None:
    tried = tune.candidates(policy, 5)
    assert len(tried) == 5 or policy == "vllm-v0"  # whose whole grid has four
    assert tried[0] == dict(POLICIES[policy].variants[0])
    assert all(tried.count(one) == 1 for one in tried)
    assert tried == tune.candidates(policy, 8)[: len(tried)]


@pytest.mark.parametrize("policy", tune.SPACES)
def test_every_draw_is_a_valid_parameter_set(policy: str) -> None:
    for parameters in tune.candidates(policy, 40):
        make_policy(policy, PLAIN, 2, parameters)


def test_the_best_trial_is_stored_beside_the_default_and_all_others(tmp_path: Path) -> None:
    output = tmp_path / "tuned.json"
    arguments = ["--trials", "2", "--seeds", "0", "--requests", "30", "--scenario", "chat", "--output", str(output)]
    assert tune.main([*arguments, "--policy", "edf"]) == 0
    assert tune.main([*arguments, "--policy", "sarathi"]) == 0
    stored = json.loads(output.read_text(encoding="utf-8"))
    assert stored["setup"]["seeds"] == [0]
    for name in ("edf", "sarathi"):  # the second run keeps the first one's
        row = stored["policies"][name]
        assert len(row["trials"]) == 2
        assert row["attained"] == max(trial["attained"] for trial in row["trials"])
        assert row["default_attained"] == row["trials"][0]["attained"]
    assert tune.stored_trials(output, setup(requests=31)) == {}


def test_a_trial_is_the_mean_over_scenarios_of_what_was_attained(tmp_path: Path) -> None:
    known = AnswerFile(tmp_path / "answers.jsonl")
    parameters = {"token_budget": 512}
    both = tune.run_trial("vllm", parameters, setup(scenarios=("chat", "mixed"), seeds=(0, 1)), known)
    apart = [
        tune.run_trial("vllm", parameters, setup(scenarios=(name,), seeds=(0, 1)), known) for name in ("chat", "mixed")
    ]
    assert both.attained == pytest.approx(sum(trial.attained for trial in apart) / 2)
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 4
