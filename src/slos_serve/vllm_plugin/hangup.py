"""SIGHUP asks a server without a terminal to read its class file again; with a terminal it means that this is closed.

The same signal says two things. A service manager, a container or ``kill -HUP`` sends it to have files read again; the
kernel sends it when the terminal of a process is closed, and then the process is to end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


def has_terminal() -> bool:
    """Whether the process belongs to a terminal; no longer once that is closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def on_hangup(read_again: Callable[[], None]) -> bool:
    """Call ``read_again`` at each SIGHUP from now on; whether it is so.

    False, and nothing is changed, with a terminal, where SIGHUP is ignored (``nohup``) or somebody else's already, and
    outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread() or has_terminal():
        return False
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        return False
    signal.signal(signal.SIGHUP, lambda _number, _frame: read_again())
    return True
