"""A JSON line for each planned step and each ended request: for the demo, for replay and for looking closely.

The file rotates at ``MOST_BYTES`` and one older file is kept. Every line has a wall-clock stamp (``time_s``, Unix
seconds). Lines are written by the telemetry thread; a full disk costs lines, never a step.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 1024 * 1024
_KEPT_FILES = 1


class _Handler(logging.handlers.RotatingFileHandler):
    """Raises instead of printing when a line cannot be written, so that the failure is counted."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise  # noqa: PLE0704  (called while the error is handled)


class EventLog:
    """Appends events to a file.

    Args:
        path: the file; ``None`` writes nothing.
        most_bytes: size at which the file is put aside as ``<name>.1`` and begun anew.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path | None, most_bytes: int = MOST_BYTES) -> None:
        self._handler: _Handler | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = _Handler(path, maxBytes=most_bytes, backupCount=_KEPT_FILES, encoding="utf-8")
            self._handler.setFormatter(logging.Formatter("%(message)s"))

    @property
    def enabled(self) -> bool:
        """Whether anybody reads along."""
        return self._handler is not None

    def write(self, kind: str, time_s: float | None = None, **fields: Any) -> None:
        """Append one event that happened at ``time_s`` (Unix seconds; now by default)."""
        if self._handler is not None:
            stamp = time.time() if time_s is None else time_s
            text = json.dumps({"kind": kind, "time_s": round(stamp, 6), **fields})
            self._handler.emit(logging.makeLogRecord({"msg": text, "args": None}))

    def close(self) -> None:
        """Close the file; what a full disk does not take is lost."""
        if self._handler is not None:
            stream = self._handler.stream
            with suppress(OSError):
                self._handler.close()
            with suppress(OSError):
                if stream is not None:
                    stream.close()
            self._handler = None
