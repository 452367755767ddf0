"""Kernels that count no references: they are handed no array to free."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import slos_serve
from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import roofline_s
from slos_serve.vllm_plugin import row_kernels

Dispatcher: Any = type(roofline_s)


def kernels() -> Iterator[tuple[str, Any]]:
    for layer in ("perf", "planning", "sim", "routing", "policies"):
        for found in pkgutil.walk_packages([f"{slos_serve.__path__[0]}/{layer}"], f"slos_serve.{layer}."):
            module = importlib.import_module(found.name)
            for name, value in vars(module).items():
                if isinstance(value, Dispatcher) and value.py_func.__module__ == found.name:
                    yield f"{found.name}.{name}", value
    for name, value in vars(row_kernels).items():
        if isinstance(value, Dispatcher):
            yield f"row_kernels.{name}", value


def counts_nothing(kernel: Any) -> bool:
    return kernel.targetoptions.get("_nrt") is False


def test_a_kernel_that_works_in_place_calls_none_that_may_make_an_array() -> None:
    looked, wrong = 0, []
    for name, kernel in kernels():
        if not counts_nothing(kernel):
            continue
        looked += 1
        called = inspect.getclosurevars(kernel.py_func).globals
        wrong += [
            f"{name} calls {other}"
            for other, value in called.items()
            if isinstance(value, Dispatcher) and not counts_nothing(value)
        ]
    assert looked > 50
    assert wrong == []


def test_a_kernel_that_makes_an_array_is_refused() -> None:
    @in_place
    def doubled(values: np.ndarray) -> float:
        return float((values * 2.0).sum())

    with pytest.raises(Exception, match="NRT"):
        doubled(np.ones(2))
