"""Reads the scheduler's event file: which requests were admitted, how long planning took.

Assumes the demo's request ids, which vLLM keeps inside its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_OUR_ID = re.compile(r"(?:warm|calm|burst)-\d{5}")


@dataclass(slots=True)
class SchedulerEvents:
    """What the scheduler wrote.

    Attributes:
        verdicts: of :class:`slos_serve.core.verdict.Verdict`, by our request id.
        kept: whether the promise that was given was kept, or without one that of the class, by our request id.
        plan_ms, added_ms: of each planned step, by phase.
        fallbacks: steps that ran in stock order because planning failed, by phase.
        preemptions: requests' preemptions by our request id.
    """

    verdicts: dict[str, str] = field(default_factory=dict)
    plan_ms: dict[str, list[float]] = field(default_factory=dict)
    added_ms: dict[str, list[float]] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    preemptions: dict[str, int] = field(default_factory=dict)
    kept: dict[str, bool] = field(default_factory=dict)


def read_events(path: Path, phase_ends: Iterable[tuple[str, int]]) -> SchedulerEvents:
    """Read an event file.

    Args:
        path: the file; one that does not exist holds no events.
        phase_ends: name of each phase and the size of the file in bytes when it ended, in order.
    """
    events = SchedulerEvents()
    data = path.read_bytes() if path.exists() else b""
    begin = 0
    for phase, end in [*phase_ends, ("after", len(data))]:
        for line in data[begin:end].splitlines():
            _take(events, phase, json.loads(line))
        begin = end
    return events


def _take(events: SchedulerEvents, phase: str, event: dict[str, Any]) -> None:
    if event["kind"] == "request":
        found = _OUR_ID.search(str(event["request_id"]))
        if found:
            events.verdicts[found.group()] = str(event["verdict"])
            events.kept[found.group()] = bool(event.get("ttft_ok") and event.get("tpot_ok"))
            events.preemptions[found.group()] = int(event.get("num_preemptions") or 0)
    elif event["kind"] == "step":
        events.plan_ms.setdefault(phase, []).append(float(event["plan_ms"]))
        events.added_ms.setdefault(phase, []).append(float(event["added_ms"]))
        if event.get("fallback"):
            events.fallbacks[phase] = events.fallbacks.get(phase, 0) + 1
