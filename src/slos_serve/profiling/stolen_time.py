"""How much processor time a hypervisor gave to other guests, so that batches measured meanwhile can be left out.

A batch that ran while the machine was elsewhere says nothing about the engine. Linux counts that time as ``steal``;
on bare metal, and where the count cannot be read, it stays 0 and no batch is left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from slos_serve.perf.fit import Sample

_COUNTERS = Path("/proc/stat")
# Column of the line "cpu user nice system idle iowait irq softirq steal ...".
_STEAL_COLUMN = 8
# A batch counts as disturbed when more than this part of its duration was stolen, summed over the cores.
DISTURBED_SHARE = 0.02
# Where so many would be left out that this part does not remain, stealing is how the machine always is: keep all.
LEAST_KEPT_SHARE = 0.3


def stolen_s(counters: Path = _COUNTERS) -> float:
    """Seconds stolen since boot, summed over the cores; 0 where that is not counted."""
    try:
        with counters.open(encoding="ascii") as file:
            columns = file.readline().split()
        return int(columns[_STEAL_COLUMN]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def undisturbed(samples: Sequence[tuple[Sample, float]]) -> list[Sample]:
    """The samples of which hardly anything was stolen; all of them when too few would be left.

    Args:
        samples: each with the seconds stolen while it ran.
    """
    kept = [sample for sample, seconds in samples if seconds <= DISTURBED_SHARE * sample.duration_s]
    return kept if len(kept) >= LEAST_KEPT_SHARE * len(samples) else [sample for sample, _ in samples]
