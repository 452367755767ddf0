"""Sarathi-Serve: all decodes in every step, and prompt chunks up to a fixed size."""

from __future__ import annotations

import numpy as np

from slos_serve.policies.sarathi import Sarathi, decodes_first
from tests.builders import EngineBuilder


def test_decodes_come_first_each_group_in_its_order() -> None:
    engine = EngineBuilder()
    prompt, decode, later = engine.prefilling(900, 100), engine.decode(), engine.decode()
    view, ordered = engine.view(), np.empty(3, dtype=np.int64)
    decodes_first(view.table.rows, view.running, ordered)
    assert ordered.tolist() == [decode, later, prompt]


def test_a_prompt_never_stalls_a_decode() -> None:
    engine = EngineBuilder()
    prompt, decode = engine.prefilling(9000, 100), engine.decode()
    plan = Sarathi(512).plan(engine.now_s, engine.view())
    assert (plan.slots.tolist(), plan.tokens.tolist()) == ([decode, prompt], [1, 511])


def test_the_chunk_is_the_same_whatever_is_promised() -> None:
    for tpot_s in (0.02, 1.0):
        engine = EngineBuilder()
        engine.decode(tpot_s=tpot_s)
        engine.wait(5000)
        assert Sarathi(256).plan(engine.now_s, engine.view()).num_tokens == 256


def test_a_prompt_starts_only_when_all_of_its_blocks_are_free() -> None:
    engine = EngineBuilder(total_blocks=100)
    decode = engine.decode(prompt_tokens=16 * 50)
    engine.wait(16 * 60)
    assert Sarathi(256).plan(engine.now_s, engine.view()).slots.tolist() == [decode]
