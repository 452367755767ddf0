"""What a drafter costs the engine it is in."""

from __future__ import annotations

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.sim.drafters import with_drafter
from slos_serve.sim.profiles import find_profile
from slos_serve.sim.question import Answer, Question
from slos_serve.sim.search import FIXED_DRAFTS, search_capacity
from tests.sim_builders import run, workload


def test_the_figures_of_the_documentation() -> None:
    served = find_profile("opt-13b-a100")
    found = with_drafter(served, "opt-125m")
    assert found.model.k_s_s == pytest.approx(1.05e-3, rel=0.01)
    assert found.model.k_c_s - served.model.k_c_s == pytest.approx(0.8e-6, rel=0.02)
    assert found.kv_capacity_tokens == 63_007
    assert found.model.k_ctx_s == served.model.k_ctx_s


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_what_needs_no_model_costs_nothing(drafter: str) -> None:
    served = find_profile("opt-13b-a100")
    assert with_drafter(served, drafter) == served


def test_wrong_drafters_are_refused() -> None:
    with pytest.raises(InvalidFieldError, match="drafter"):
        with_drafter(find_profile("opt-13b-a100"), "opt-7b")
    with pytest.raises(InvalidFieldError, match="profile of"):
        with_drafter(find_profile("smollm2-135m-cpu"), "opt-125m")
    with pytest.raises(InvalidFieldError, match="drafter"):
        run(workload([0.0], [10], [10]), "slos-serve", drafter="opt-7b")


def test_one_fixed_length_is_tuned_for_those_that_take_one() -> None:
    """On the best of the other parameters, and only where there is a drafter."""
    tried: dict[str, list[int]] = {}
    for drafter in ("none", "ngram"):
        base = Question("chat", "vllm", {}, "opt-13b-a100", "poisson", 1.0, 100, 0, drafter=drafter)
        search = search_capacity(base, seeds=[30])
        asked: set[int] = set()
        questions = next(search)
        try:
            while True:
                asked |= {int(question.parameters.get("draft_tokens", 0)) for question in questions}
                answers = [
                    Answer(0.95 if question.rate_rps < 2.0 else 0.5, 0.9 if question.rate_rps < 2.0 else 0.5)
                    for question in questions
                ]
                questions = search.send(answers)
        except StopIteration:
            tried[drafter] = sorted(asked)
    assert tried == {"none": [0], "ngram": [0, *FIXED_DRAFTS]}
