"""The routing kernels in the API process."""

from __future__ import annotations

import subprocess
import sys

from slos_serve.routing.warm_up import warm_up_routing


def load_kernels() -> None:
    """Load the routing kernels; where they are not in their cache yet, another process compiles them first.

    Compiling takes a minute and holds the interpreter, which would stop the server's event loop.
    """
    code = "from slos_serve.routing.warm_up import warm_up_routing; warm_up_routing()"
    subprocess.run([sys.executable, "-c", code], check=False, stdin=subprocess.DEVNULL)
    warm_up_routing()
