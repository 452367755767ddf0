"""A JSON line for each planned step and each ended request: for the demo, for replay and for looking closely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to a file; each line is whole when it appears.

    Args:
        path: the file; ``None`` writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", buffering=1, encoding="utf-8")

    @property
    def enabled(self) -> bool:
        """Whether anybody reads along."""
        return self._file is not None

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
