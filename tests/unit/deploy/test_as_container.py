"""The images' user and file system without a container engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slos_serve.version import VERSION

ROOT = Path(__file__).parents[3]
AS_CONTAINER = ROOT / "scripts" / "as_container.sh"
COMMAND = [sys.executable, "-c", "from slos_serve.cli.main import app; app()"]

can_unshare = (
    os.geteuid() == 0
    and shutil.which("setpriv") is not None
    and subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0
)
pytestmark = pytest.mark.skipif(not can_unshare, reason="needs root, setpriv and a mount namespace")


def test_nobody_writes_but_where_volumes_are() -> None:
    tries = f"for path in / {ROOT} /root /tmp /dev/shm /var/cache/slos-serve; do touch $path/x && echo $path; done"
    said = subprocess.run([AS_CONTAINER, "bash", "-c", f"id -u; {tries}"], check=False, capture_output=True, text=True)
    assert said.stdout.split() == ["10001", "/tmp", "/dev/shm", "/var/cache/slos-serve"]


def test_a_command_runs() -> None:
    said = subprocess.run([AS_CONTAINER, *COMMAND, "--version"], check=True, capture_output=True, text=True)
    assert said.stdout == f"slos-serve {VERSION}\n"
