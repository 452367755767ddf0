"""Policies by name: made with any of their variants, and refused with a reason."""

from __future__ import annotations

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.policies.distserve import DistServeDecode, DistServePrefill
from slos_serve.policies.registry import POLICIES, make_policy, policy_entry
from tests.builders import OPT_13B_A100, EngineBuilder


@pytest.mark.parametrize("name", POLICIES)
def test_every_variant_plans_a_waiting_prompt(name: str) -> None:
    entry = policy_entry(name)
    for parameters in entry.variants:
        engine = EngineBuilder()
        slot = engine.wait(300, due_in_s=2.0)
        view = engine.view()
        policy = make_policy(name, OPT_13B_A100, 2, parameters)
        plan = policy.plan(engine.now_s, view)
        policy.commit(plan, view, plan.slots)
        assert plan.slots.tolist() == [slot]


@pytest.mark.parametrize("name", [name for name, entry in POLICIES.items() if entry.fixed_drafts])
def test_those_with_fixed_drafts_take_a_draft_length_and_check_it(name: str) -> None:
    decode = POLICIES[name].make_decode is not None
    engine = EngineBuilder()
    engine.decode()
    policy = make_policy(name, OPT_13B_A100, 1, {"draft_tokens": 3}, decode=decode)
    assert policy.plan(engine.now_s, engine.view()).draft_tokens.tolist() == [3]
    with pytest.raises(InvalidFieldError, match="draft_tokens"):
        make_policy(name, OPT_13B_A100, 1, {"draft_tokens": 99}, decode=decode)


def test_prefill_and_decode_apart_have_a_policy_each() -> None:
    assert isinstance(make_policy("distserve", OPT_13B_A100, 1), DistServePrefill)
    assert isinstance(make_policy("distserve", OPT_13B_A100, 1, decode=True), DistServeDecode)


def test_an_unknown_policy_and_an_unknown_parameter_are_named() -> None:
    with pytest.raises(InvalidFieldError, match="one of"):
        policy_entry("sarathy")
    with pytest.raises(InvalidFieldError, match="chunk_size"):
        make_policy("sarathi", OPT_13B_A100, 1, {"chunk_size": 3})
