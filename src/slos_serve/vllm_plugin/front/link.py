"""From the engine core to the API process of the same server: the planner's state, and what became of requests.

Two ZeroMQ sockets in a folder of this user, named after the API process, which is the parent of the engine core. So the
two find each other without a setting. The state socket keeps only the newest publication; the outcome socket drops
messages that nobody takes. Sending never waits.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.cache_folder import temporary_root

# A path of a Unix socket has at most 107 bytes.
MAX_SOCKET_PATH = 100
MOST_OUTCOMES = 10_000
RECONNECT_MS = 500
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
# Key of an outcome message: (ticket, rank) of each promise that has just been made to a client who was told none.
PROMISED_KEY = "promised"
_logger = logging.getLogger("vllm.slos_serve")


def socket_path(kind: str, process: int) -> Path | None:
    """Path of a socket of an API process; ``None`` where no safe folder can be had."""
    try:
        folder = temporary_root() / f"slos-serve-front-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except (OSError, InvalidFieldError):
        return None
    path = folder / f"{process}.{kind}"
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return path if private and len(str(path)) <= MAX_SOCKET_PATH else None


def front_process(vllm_config: Any) -> int | None:
    """The API process that started this engine core; ``None`` where none did or several engines share one."""
    parent = multiprocessing.parent_process()
    parallel = vllm_config.parallel_config
    if parent is None or parent.pid is None or parallel.data_parallel_size > 1:
        return None
    return parent.pid


class OutcomeLink:
    """The engine's end for outcomes; each thread that writes has its own.

    Args:
        process: the API process.
    """

    def __init__(self, process: int) -> None:
        path = socket_path("outcomes", process)
        self._socket: zmq.Socket[bytes] | None = None
        if path is not None:
            self._socket = zmq.Context.instance().socket(zmq.PUSH)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.SNDHWM, MOST_OUTCOMES)
            self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
            self._socket.setsockopt(zmq.IMMEDIATE, 1)
            self._socket.connect(f"ipc://{path}")

    def write(self, fields: dict[str, Any]) -> None:
        """Send one outcome; dropped where nobody listens."""
        if self._socket is not None:
            with suppress(zmq.Again):
                self._socket.send(json.dumps(fields).encode("ascii"), zmq.NOBLOCK)

    def close(self) -> None:
        """Send no more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class FrontSockets:
    """The API process's end: both sockets, bound.

    Raises:
        OSError, zmq.ZMQError: the folder or a socket cannot be made.
    """

    def __init__(self, process: int) -> None:
        self._paths: list[Path] = []
        self._context = zmq.Context(io_threads=1)
        try:
            self.state = self._bound("state", process, {zmq.CONFLATE: 1})
            self.outcomes = self._bound("outcomes", process, {zmq.RCVHWM: MOST_OUTCOMES})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free both addresses."""
        self._context.destroy(linger=0)
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _bound(self, kind: str, process: int, options: dict[int, int]) -> zmq.Socket[bytes]:
        path = socket_path(kind, process)
        if path is None:
            raise OSError("no private folder for the sockets between engine core and API process")
        _remove_stale(path.parent)
        path.unlink(missing_ok=True)  # of a process that had the same number
        socket = self._context.socket(zmq.PULL)
        for option, value in options.items():
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.bind(f"ipc://{path}")
        self._paths.append(path)
        return socket


def _remove_stale(folder: Path) -> None:
    """Remove the sockets of API processes that were killed."""
    for path in folder.iterdir():
        name = path.name.partition(".")[0]
        if name.isdigit():
            try:
                os.kill(int(name), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # it lives, as somebody else's
