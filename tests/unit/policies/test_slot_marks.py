"""A mark belongs to a request, not to the slot it is in."""

from __future__ import annotations

import numpy as np

from slos_serve.policies.slot_marks import SlotMarks
from tests.builders import EngineBuilder


def test_a_mark_is_gone_with_its_request() -> None:
    engine, marks = EngineBuilder(), SlotMarks()
    first, second = engine.wait(), engine.wait()
    marks.add(engine.table.rows, np.array([first]))
    assert marks.of(engine.table.rows, np.array([first, second])).tolist() == [True, False]
    engine.table.remove(first)
    assert engine.wait() == first
    assert marks.of(engine.table.rows, np.array([first])).tolist() == [False]


def test_marks_follow_a_table_that_grows_and_can_be_cleared() -> None:
    engine, marks = EngineBuilder(), SlotMarks()
    slots = np.array([engine.wait() for _ in range(200)])
    assert not marks.of(engine.table.rows, slots).any()
    marks.add(engine.table.rows, slots[150:])
    assert marks.of(engine.table.rows, slots).sum() == 50
    marks.clear()
    assert not marks.of(engine.table.rows, slots).any()
