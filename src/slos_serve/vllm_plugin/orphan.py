"""An engine core that ends with the process that started it.

vLLM's engine core waits for requests for ever when its server is killed, and keeps the accelerator's memory. A replica
that is replaced would find none left.
"""

from __future__ import annotations

import os
import threading
import time

_LOOK_EVERY_S = 1.0


def end_with_parent() -> None:
    """End this process within a second or two of its parent's end."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="slos-serve parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)
