"""Finds ``vllm_xargs`` in a request body and puts another one in its place, without loading the rest of the body.

The middleware runs on the server's event loop and before vLLM's authentication, so a body must not cost more than it
weighs. ``json.loads`` builds an object for every value and holds the interpreter meanwhile, in whichever thread it
runs: 8 MiB of ``[],[],...`` block for half a second. msgspec checks the syntax and builds only the one field: about
2 ms a MiB, no memory. A body that only Python's reader takes (NaN, lone surrogates, UTF-16) is read by it when small.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.tiers import BODY_FIELDS, PRIORITY, SERVICE_TIER

XARGS = "vllm_xargs"
# What json.loads may be given: some milliseconds of the event loop at the worst.
MAX_LOADED_BYTES = 64 * 1024


# Longest value of a field of others that is looked at.
MAX_TIER_BYTES = 256


class _Fields(msgspec.Struct):
    vllm_xargs: msgspec.Raw = msgspec.Raw(b"")
    service_tier: msgspec.Raw = msgspec.Raw(b"")
    priority: msgspec.Raw = msgspec.Raw(b"")


_DECODER = msgspec.json.Decoder(_Fields)


@dataclass(frozen=True, slots=True)
class BodyFields:
    """What was found in a body.

    Attributes:
        data: the body.
        xargs: value of its ``vllm_xargs``, ``None`` when absent or null.
        start, end: bytes that the value takes; both -1 when absent.
        loaded: the whole body, where Python's reader had to be used.
        tiers: short values of ``service_tier`` and ``priority``, as text.
    """

    data: bytes
    xargs: Any = None
    start: int = -1
    end: int = -1
    loaded: dict[str, Any] | None = None
    tiers: Mapping[str, str] = field(default_factory=dict)

    def with_xargs(self, added: Mapping[str, str | float], dropped: Collection[str] = ()) -> bytes:
        """The body with ``added`` over what ``vllm_xargs`` has, less ``dropped``; as it came when nothing changes."""
        if not (added or dropped) or not (self.xargs is None or isinstance(self.xargs, dict)):
            return self.data  # vLLM refuses a vllm_xargs that is no object, and says why
        merged = {**{key: value for key, value in (self.xargs or {}).items() if key not in dropped}, **added}
        if self.loaded is not None:
            return _dumped({**self.loaded, XARGS: merged}) or self.data
        value = _dumped(merged)
        if value is None:
            return self.data
        if self.start >= 0:
            return b"".join((self.data[: self.start], value, self.data[self.end :]))
        brace = self.data.index(b"{") + 1
        rest = self.data[brace:]
        comma = b"" if rest.lstrip(b" \t\n\r")[:1] == b"}" else b","
        return b"".join((self.data[:brace], f'"{XARGS}":'.encode("ascii"), value, comma, rest))


def body_fields(data: bytes) -> BodyFields | None:
    """What ``data`` holds, ``None`` when it is no JSON object.

    Raises:
        InvalidFieldError: ``vllm_xargs`` is too long, or the body is long and no strict JSON.
    """
    try:
        found = _DECODER.decode(data)
        raw = found.vllm_xargs
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as fault:
        return _loaded(data, fault)
    tiers = _tiers({SERVICE_TIER: _short(found.service_tier), PRIORITY: _short(found.priority)})
    value = memoryview(raw)
    if not value:
        return BodyFields(data, tiers=tiers)
    if len(value) > MAX_LOADED_BYTES:
        raise InvalidFieldError(XARGS, f"{len(value)} bytes", f"at most {MAX_LOADED_BYTES} bytes with SLO fields")
    # msgspec.Raw is a view of the body it was found in; nothing but its address says where.
    start = int(np.frombuffer(raw, np.uint8).ctypes.data - np.frombuffer(data, np.uint8).ctypes.data)
    end = start + len(value)
    assert 0 <= start < end <= len(data) and data[start:end] == value
    try:
        return BodyFields(data, json.loads(data[start:end]), start, end, tiers=tiers)
    except (ValueError, RecursionError):
        return None


def _loaded(data: bytes, fault: Exception) -> BodyFields | None:
    if len(data) > MAX_LOADED_BYTES:
        if isinstance(fault, msgspec.ValidationError | RecursionError):
            return None  # no object, or nested deeper than any reader goes
        raise InvalidFieldError(
            "body", str(fault), f"strict JSON, where SLO fields come in over {MAX_LOADED_BYTES} bytes"
        )
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    return BodyFields(data, document.get(XARGS), loaded=document, tiers=_tiers(document))


def _short(raw: msgspec.Raw) -> object:
    """A short scalar; ``None`` for whatever else there is."""
    value = memoryview(raw)
    if not 0 < len(value) <= MAX_TIER_BYTES:
        return None
    try:
        return json.loads(bytes(value))
    except (ValueError, RecursionError):
        return None


def _tiers(found: Mapping[str, object]) -> dict[str, str]:
    """Fields of others that hold a text or a whole number."""
    values = {name: found.get(name) for name in BODY_FIELDS}
    return {
        name: str(value)
        for name, value in values.items()
        if isinstance(value, str | int) and not isinstance(value, bool) and _is_short(value)
    }


def _is_short(value: str | int) -> bool:
    """Whether a value is short enough to be a tier's."""
    return len(value) <= MAX_TIER_BYTES if isinstance(value, str) else abs(value) < 1 << 62


def _dumped(value: dict[str, Any]) -> bytes | None:
    try:
        return json.dumps(value).encode("ascii")
    except RecursionError:
        return None
