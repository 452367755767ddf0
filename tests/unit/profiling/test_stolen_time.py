"""Batches measured while the machine was taken away are left out, unless that is how it always is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slos_serve.perf.batch_time import BatchShape
from slos_serve.perf.fit import Sample
from slos_serve.profiling.stolen_time import DISTURBED_SHARE, stolen_s, undisturbed

QUIET = Sample(BatchShape(4), 0.1)
TAKEN = Sample(BatchShape(8), 0.3)


def test_steal_is_read_in_seconds(tmp_path: Path) -> None:
    counters = tmp_path / "stat"
    counters.write_text("cpu  1 2 3 4 5 6 7 800 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n", encoding="ascii")
    assert stolen_s(counters) == pytest.approx(800 / os.sysconf("SC_CLK_TCK"))


@pytest.mark.parametrize("content", ["", "cpu 1 2 3\n", "cpu a b c d e f g h i\n"])
def test_without_a_count_nothing_is_stolen(tmp_path: Path, content: str) -> None:
    counters = tmp_path / "stat"
    assert stolen_s(counters) == 0.0
    counters.write_text(content, encoding="ascii")
    assert stolen_s(counters) == 0.0


def test_disturbed_batches_are_left_out() -> None:
    just = DISTURBED_SHARE * QUIET.duration_s
    assert undisturbed([(QUIET, 0.0), (TAKEN, 0.1), (QUIET, just)]) == [QUIET, QUIET]


def test_all_are_kept_when_hardly_any_is_undisturbed() -> None:
    assert len(undisturbed([(TAKEN, 0.1)] * 8 + [(QUIET, 0.0)] * 2)) == 10
