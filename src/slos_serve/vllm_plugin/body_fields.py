"""Finds ``vllm_xargs`` in a request body and puts another one in its place, without loading the rest of the body.

The middleware runs on the server's event loop and before vLLM's authentication, so a body must not cost more than it
weighs. ``json.loads`` builds an object for every value and holds the interpreter meanwhile, in whichever thread it
runs: 8 MiB of ``[],[],...`` block for half a second. msgspec checks the syntax and builds only the one field: about
2 ms a MiB, no memory. A body that only Python's reader takes (NaN, lone surrogates, UTF-16) is read by it when small.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from slos_serve.core.errors import InvalidFieldError

XARGS = "vllm_xargs"
# What json.loads may be given: some milliseconds of the event loop at the worst.
MAX_LOADED_BYTES = 64 * 1024


class _Fields(msgspec.Struct):
    vllm_xargs: msgspec.Raw = msgspec.Raw(b"")


_DECODER = msgspec.json.Decoder(_Fields)


@dataclass(frozen=True, slots=True)
class BodyFields:
    """What was found in a body.

    Attributes:
        data: the body.
        xargs: value of its ``vllm_xargs``, ``None`` when absent or null.
        start, end: bytes that the value takes; both -1 when absent.
        loaded: the whole body, where Python's reader had to be used.
    """

    data: bytes
    xargs: Any = None
    start: int = -1
    end: int = -1
    loaded: dict[str, Any] | None = None

    def with_xargs(self, added: dict[str, str | float]) -> bytes:
        """The body with ``added`` over what ``vllm_xargs`` has; as it came when there is nowhere to add."""
        if not added or not (self.xargs is None or isinstance(self.xargs, dict)):
            return self.data  # vLLM refuses a vllm_xargs that is no object, and says why
        merged = {**(self.xargs or {}), **added}
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
        raw = _DECODER.decode(data).vllm_xargs
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as fault:
        return _loaded(data, fault)
    value = memoryview(raw)
    if not value:
        return BodyFields(data)
    if len(value) > MAX_LOADED_BYTES:
        raise InvalidFieldError(XARGS, f"{len(value)} bytes", f"at most {MAX_LOADED_BYTES} bytes with SLO fields")
    # msgspec.Raw is a view of the body it was found in; nothing but its address says where.
    start = int(np.frombuffer(raw, np.uint8).ctypes.data - np.frombuffer(data, np.uint8).ctypes.data)
    end = start + len(value)
    assert 0 <= start < end <= len(data) and data[start:end] == value
    try:
        return BodyFields(data, json.loads(data[start:end]), start, end)
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
    return BodyFields(data, document.get(XARGS), loaded=document) if isinstance(document, dict) else None


def _dumped(value: dict[str, Any]) -> bytes | None:
    try:
        return json.dumps(value).encode("ascii")
    except RecursionError:
        return None
