"""The chart of predicted against measured is drawn whatever regions the samples have."""

from __future__ import annotations

from pathlib import Path

import pytest

from slos_serve.bench.profile_plot import plot_profile
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.fit import Sample

MODEL = BatchTimeModel(1e-3, 1e-2, 0.0, 0.0)
DECODE = [Sample(BatchShape(n, num_seqs=n), 0.011 + 1e-3 * n) for n in (1, 2, 8)]
PREFILL = [Sample(BatchShape(n), 0.02 + 1e-3 * n, prefill_tokens=n) for n in (16, 400)]


@pytest.mark.parametrize("samples", [DECODE, PREFILL, DECODE + PREFILL, DECODE[:1]], ids=["d", "p", "both", "one"])
def test_a_chart_is_written_and_its_folder_made(samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "charts" / "p.png"
    plot_profile(MODEL, samples, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")
