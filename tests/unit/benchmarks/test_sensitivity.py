"""``python -m benchmarks.sensitivity``: constants exist where they are patched, and a line reads as it should."""

from __future__ import annotations

import importlib
import inspect

import pytest

from benchmarks.sensitivity import CONSTANTS, Constant, patch, row


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda one: one.name)
def test_each_module_reads_the_constant_it_is_patched_in(constant: Constant) -> None:
    for name in constant.modules:
        module = importlib.import_module(f"slos_serve.planning.{name}")
        assert getattr(module, constant.name) == constant.today()
        # Once where it is set or imported, once where it is read.
        assert inspect.getsource(module).count(constant.name) >= 2


def test_a_patch_keeps_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    admission = importlib.import_module("slos_serve.planning.admission")
    monkeypatch.setattr(admission, "MOST_WORK", admission.MOST_WORK)
    patch(Constant("MOST_WORK", ("admission",)), 3000.0)
    assert admission.MOST_WORK == 3000
    assert isinstance(admission.MOST_WORK, int)


def test_a_line_has_points_against_today() -> None:
    line = row(Constant("TO_COME", ("admission",)), [0.9, 0.8], [[0.91, 0.8], [0.89, 0.75]])
    assert line == "| `TO_COME` | 2 | 1: +1.0, +0.0 | 4: -1.0, -5.0 |"
