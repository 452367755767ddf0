"""Compiling before the first request has to wait for it."""

from __future__ import annotations

from typing import Any

from slos_serve.planning import plan_step as kernels
from slos_serve.planning.planner import Planner
from slos_serve.vllm_plugin.warm_up import warm_up
from tests.builders import OPT_13B_A100, EngineBuilder


def test_the_first_real_plan_compiles_nothing() -> None:
    planner = Planner(OPT_13B_A100, 2)
    warm_up(planner)
    kernel: Any = kernels.plan_step
    compiled = len(kernel.signatures)
    engine = EngineBuilder()
    engine.decode(ahead_s=0.05)
    engine.wait(500)
    planner.plan(engine.now_s, engine.view())
    assert len(kernel.signatures) == compiled > 0
