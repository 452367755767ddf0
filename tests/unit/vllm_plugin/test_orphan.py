"""An engine core whose server was killed ends too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

CHILD = """
import threading
from slos_serve.vllm_plugin.orphan import end_with_parent
end_with_parent()
print("ready", flush=True)
threading.Event().wait()
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}])
"""


def test_it_ends_with_its_parent() -> None:
    """The child holds the pipe's other end, so reading to its end waits until it is gone."""
    reader, writer = os.pipe()
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.readline() == b"ready\n"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert pipe.read() == b""
