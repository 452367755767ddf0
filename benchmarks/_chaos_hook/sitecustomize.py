"""Loaded by every Python process that :mod:`benchmarks.chaos` starts: lets files cut or skew a replica's publications.

In the folder ``SLOS_SERVE_CHAOS``, a file ``cut-PID`` keeps what the replica of that process publishes from being sent.
``skew-PID`` holds seconds that its clock is ahead in everything it publishes. ``did-PID`` appears once either was done.
Nothing of the package knows this file.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

RELAY = "slos_serve.ray_serve.relay"
TIMES = ("time_s", "ready_s", "seen_until_s", "due_s", "moments_s")


def disturb(module: ModuleType, folder: Path) -> None:
    """Put the files between the relay and its socket."""
    send = module.Relay._send

    def disturbed(relay: Any, envelope: Any) -> None:
        cut, skew, did = (folder / f"{name}-{os.getpid()}" for name in ("cut", "skew", "did"))
        if cut.exists():
            relay._last_sent_s = envelope.sent_s
            did.touch()
        elif skew.exists():
            send(relay, ahead(envelope, float(skew.read_text(encoding="ascii"))))
            did.touch()
        else:
            send(relay, envelope)

    module.Relay._send = disturbed


def ahead(envelope: Any, skew_s: float) -> Any:
    """The message as a replica would send it whose clock is ahead by ``skew_s``."""
    document = json.loads(envelope.payload)
    for name in TIMES:
        value = document[name]
        document[name] = [item + skew_s for item in value] if isinstance(value, list) else value + skew_s
    return replace(envelope, sent_s=envelope.sent_s + skew_s, payload=json.dumps(document).encode("ascii"))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the relay's module as ever, and disturbs it once it is loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != RELAY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run, folder = spec.loader.exec_module, self._folder

            def exec_module(module: ModuleType) -> None:
                run(module)
                disturb(module, folder)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "SLOS_SERVE_CHAOS" in os.environ:
    sys.meta_path.insert(0, _Finder(Path(os.environ["SLOS_SERVE_CHAOS"])))
