"""The document behind the live page: everything that ``/slo`` and ``slos-serve top`` show, as plain numbers and words.

The engine core sends counts, queues, steps and streams (:mod:`slos_serve.vllm_plugin.live.feed`); the API process adds
what it told clients. Nothing of a prompt or an answer is in it, and no id that a client chose. Counts are those of
``/metrics``: ``slos_serve:requests_total`` and ``slos_serve:attained_total``.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from slos_serve.core.slo import NO_SLO_CLASS, SLOClass
from slos_serve.core.verdict import SENTENCES, Verdict, Why
from slos_serve.files.class_file import CUSTOM_CLASS

FORMAT = "slos-serve-live/1"
MOST_VERDICTS = 40
# The page's history: this many parts of so many seconds.
PART_S, NUM_PARTS = 10, 60
WATCHED_FOR_S = 10.0
Counts = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class _Part:
    """Counts and queues as they were last told within a part of the history."""

    number: int
    promised: Mapping[str, int]
    kept: Mapping[str, int]
    running: int
    waiting: int


class Watch:
    """Tells the engine core, by a file, that somebody looks.

    Args:
        path: the file; ``None`` tells nobody.
        clock_s: says when nobody has looked for long enough.
    """

    def __init__(self, path: Path | None, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock_s = clock_s
        self._until_s: float | None = None

    def looked(self) -> None:
        """Somebody has asked for the document."""
        if self._until_s is None and self._path is not None:
            self._path.touch(mode=0o600)
        self._until_s = self._clock_s() + WATCHED_FOR_S

    def rest(self) -> None:
        """Called now and then: take the file away once nobody looks any more."""
        if self._until_s is not None and self._clock_s() > self._until_s:
            self.close()

    def close(self) -> None:
        """Nobody looks."""
        self._until_s = None
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


class LiveState:
    """What is known of one server. The engine's messages come in a thread, everything else on the event loop.

    Args:
        model: the name that clients use.
        classes: of the class file.
        clock_s: wall clock; every time in the document is on it.
    """

    def __init__(self, model: str, classes: Iterable[SLOClass], clock_s: Callable[[], float] = time.time) -> None:
        self._model = model
        self._classes = tuple(classes)
        self._clock_s = clock_s
        self._started_s = clock_s()
        self._verdicts: deque[dict[str, Any]] = deque(maxlen=MOST_VERDICTS)
        self._told: dict[str, dict[str, int]] = {}
        self._parts: deque[_Part] = deque(maxlen=NUM_PARTS + 1)
        self._engine: Mapping[str, Any] = {}
        self._heard_s: float | None = None
        self._kv: dict[str, int] | None = None
        self._headroom: Mapping[str, int] = {}
        self.replicas: Callable[[], list[dict[str, Any]]] | None = None

    # What comes in --------------------------------------------------------------------------------------------

    def classes_changed(self, classes: Iterable[SLOClass]) -> None:
        """The class file was read again."""
        self._classes = tuple(classes)

    def told(
        self,
        slo_class: str | None,
        verdict: Verdict,
        reason: Why,
        predicted_ttft_s: float | None = None,
        target_ttft_s: float = math.inf,
    ) -> None:
        """A client was told what becomes of its request."""
        name = self._label(slo_class)
        counts = self._told.setdefault(name, {})
        counts[verdict] = counts.get(verdict, 0) + 1
        self._verdicts.append(
            {
                "time_s": round(self._clock_s(), 3),
                "slo_class": name,
                "verdict": str(verdict),
                "reason": str(reason),
                "text": SENTENCES[reason],
                "predicted_ttft_ms": _ms(predicted_ttft_s),
                "target_ttft_ms": _ms(target_ttft_s),
            }
        )

    def heard(self, message: Mapping[str, Any]) -> None:
        """The engine core sent what it knows."""
        now_s = self._clock_s()
        self._engine, self._heard_s = message, now_s
        queue = message["queue"]
        part = _Part(
            int(now_s // PART_S),
            {name: _promised(counts) for name, counts in message["requests"].items()},
            {name: _promised(counts) for name, counts in message["attained"].items()},
            sum(queue["running"]),
            sum(queue["waiting"]),
        )
        if self._parts and self._parts[-1].number == part.number:
            self._parts[-1] = part
        else:
            self._parts.append(part)

    def gauges(self, kv: dict[str, int], headroom: Mapping[str, int]) -> None:
        """KV blocks of the engine and how many typical requests of each class could be promised now."""
        self._kv, self._headroom = kv, headroom

    # What goes out --------------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """The whole of it, for JSON."""
        engine, now_s = self._engine, self._clock_s()
        return {
            "format": FORMAT,
            "time_s": round(now_s, 3),
            "uptime_s": round(now_s - self._started_s, 1),
            "model": self._model,
            "heard_s_ago": None if self._heard_s is None else round(now_s - self._heard_s, 2),
            "armed": engine.get("armed"),
            "correction": engine.get("correction"),
            "queue": engine.get("queue"),
            "kv_blocks": self._kv,
            "classes": self._class_rows(),
            "history": self._history(now_s),
            "steps": engine.get("steps", []),
            "streams": engine.get("streams", []),
            "verdicts": list(reversed(self._verdicts)),
            "replicas": None if self.replicas is None else self.replicas(),
        }

    def _class_rows(self) -> list[dict[str, Any]]:
        requests: Counts = self._engine.get("requests", {})
        attained: Counts = self._engine.get("attained", {})
        found = {slo_class.name: slo_class for slo_class in self._classes}
        others = [name for name in (CUSTOM_CLASS, NO_SLO_CLASS) if name in requests or name in self._told]
        return [
            {
                "name": name,
                "promise": _promise(name, found.get(name)),
                "requests": dict(requests.get(name, {})),
                "attained": dict(attained.get(name, {})),
                "told": dict(self._told.get(name, {})),
                "headroom": self._headroom.get(name),
            }
            for name in (*found, *others)
        ]

    def _history(self, now_s: float) -> dict[str, Any]:
        """Promises that ended and were kept within each part, the oldest first; queues at its end."""
        parts = list(self._parts)
        since = int(now_s // PART_S) - NUM_PARTS
        pairs = [(one, two) for one, two in pairwise(parts) if two.number > since]
        names = list(parts[-1].promised) if parts else []
        return {
            "part_s": PART_S,
            "end_s": [(after.number + 1) * PART_S for _, after in pairs],
            "running": [after.running for _, after in pairs],
            "waiting": [after.waiting for _, after in pairs],
            "classes": {
                name: {
                    "promised": [_grown(before.promised, after.promised, name) for before, after in pairs],
                    "kept": [_grown(before.kept, after.kept, name) for before, after in pairs],
                }
                for name in names
                if name != NO_SLO_CLASS
            },
        }

    def _label(self, slo_class: str | None) -> str:
        if slo_class is None:
            return NO_SLO_CLASS
        return slo_class if any(slo_class == known.name for known in self._classes) else CUSTOM_CLASS


def _grown(before: Mapping[str, int], after: Mapping[str, int], name: str) -> int:
    return max(after.get(name, 0) - before.get(name, 0), 0)


def _promised(counts: Mapping[str, int]) -> int:
    """Of requests by verdict, those with a promise: the first one of their class, or a weaker one."""
    return counts.get(Verdict.ADMITTED, 0) + counts.get(Verdict.SECOND_BEST, 0)


def _promise(name: str, slo_class: SLOClass | None) -> str:
    """A class's promises in words, weaker ones after the first."""
    if slo_class is None:
        return "no promise" if name == NO_SLO_CLASS else "as each request asks"
    return "; else ".join(_one_promise(one) for one in slo_class.promises)


def _one_promise(slo_class: SLOClass) -> str:
    slo, told = slo_class.slo, []
    if slo.ttft_ms is not None:
        told.append(f"first token within {slo.ttft_ms:g} ms")
    elif slo.ttft_slowdown is not None:
        told.append(f"first token within {slo.ttft_slowdown:g} times its time alone")
    rates = [stage.slo.tpot_ms for stage in slo_class.stages if stage.slo.tpot_ms is not None]
    if rates:
        told.append(f"then {', '.join(f'{rate:g}' for rate in rates)} ms per token")
    if slo.e2e_ms is not None:
        told.append(f"answer within {slo.e2e_ms:g} ms")
    return ", ".join(told) or "no promise"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1e3, 1)
