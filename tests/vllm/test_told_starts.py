"""When the front end says that requests without a promise begin, and when they do on vLLM's real scheduler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm")

from slos_serve.bench.requests import BenchRequest
from tests.vllm.dry_load import Start
from tests.vllm.test_told import dry_load

CLASSES = "classes: {chat: {ttft_ms: 3000, tpot_ms: 300}}\n"


def told_over_true(start: Start, folder: Path, every_s: float, count: int, slo_class: str | None) -> list[float]:
    """Of requests that come one every ``every_s``, each second one of a class: those without a promise, in order."""
    rng = np.random.default_rng(0)
    requests = [
        BenchRequest(f"r{k}", every_s * k, "w " * int(rng.integers(50, 600)), 20, slo_class if k % 2 else None)
        for k in range(count)
    ]
    load = dry_load(start, folder, CLASSES)
    load.run(requests, {None: 1.0, "chat": 1.0})
    return [load.starts[key] / began_s for key, began_s in load.began.items()]


def test_a_crowd_without_promises_is_told_about_when_each_begins(start: Start, tmp_path: Path) -> None:
    found = told_over_true(start, tmp_path, 0.05, 60, None)
    assert len(found) == 60
    assert 0.7 < np.median(found) < 1.2
    assert np.quantile(found, 0.05) > 0.5 and np.quantile(found, 0.95) < 1.5


def test_beside_promises_that_take_nearly_all_the_order_of_size_is_right(start: Start, tmp_path: Path) -> None:
    found = told_over_true(start, tmp_path, 0.5, 80, "chat")
    assert len(found) == 40
    assert 0.6 < np.median(found) < 1.5
    assert np.quantile(found, 0.1) > 0.3 and np.quantile(found, 0.9) < 3.0
