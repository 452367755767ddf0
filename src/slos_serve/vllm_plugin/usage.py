"""The usage at the end of a stream also says what was promised and measured."""

from __future__ import annotations

import json
from collections.abc import Callable

_USAGE, _NO_CHOICES = b'"usage":{', b'"choices":[]'


def with_usage(part: bytes, measured: Callable[[int], dict[str, object]]) -> bytes:
    """A part of a stream of server-sent events; the chunk with the final usage also gets what was measured.

    Args:
        part: whole events.
        measured: what to add, given the number of output tokens.

    Returns:
        ``part`` itself where there is no such chunk.
    """
    if _USAGE not in part or _NO_CHOICES not in part:
        return part
    return b"\n\n".join(_with_usage(event, measured) for event in part.split(b"\n\n"))


def _with_usage(event: bytes, measured: Callable[[int], dict[str, object]]) -> bytes:
    if not event.startswith(b"data: {") or _USAGE not in event or _NO_CHOICES not in event:
        return event
    try:
        chunk = json.loads(event.removeprefix(b"data: "))
        chunk["usage"]["slo"] = measured(int(chunk["usage"]["completion_tokens"]))
    except (ValueError, KeyError, TypeError):
        return event
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode("ascii")
