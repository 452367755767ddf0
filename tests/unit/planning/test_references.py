"""Every array that a kernel makes is freed: those kernels that count no references are handed none to free."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COUNTED = """
import contextlib, gc, io, sys
from numba.core.runtime import rtsys
from slos_serve.cli.main import app

def left():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        app()
    gc.collect()
    counted = rtsys.get_allocation_stats()
    return counted.alloc - counted.free

left()
before, after = left(), left()
print(rtsys.get_allocation_stats().alloc, after - before)
"""
BOTH = ["--replicas", "2", "--router", "slo", "--rate", "6", "--requests", "60"]


@pytest.mark.parametrize(
    "options",
    [
        ["--scenario", "mixed", *BOTH],
        ["--scenario", "answers", *BOTH],
        ["--scenario", "long", "--rate", "1", "--requests", "40"],
        ["--scenario", "chat", "--drafter", "opt-125m", "--acceptance", "0.7", "--rate", "4", "--requests", "40"],
        ["--scenario", "mixed", "--policy", "sarathi", "--rate", "3", "--requests", "40"],
    ],
    ids=lambda options: options[1] + (" of a rival" if "sarathi" in options else ""),
)
def test_a_run_frees_all_arrays(options: list[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-c", COUNTED, "simulate", *options],
        env={**os.environ, "NUMBA_NRT_STATS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    made, left = map(int, found.stdout.split()[-2:])
    assert made > 1000
    assert left == 0, f"{left} of {made} arrays were not freed"
