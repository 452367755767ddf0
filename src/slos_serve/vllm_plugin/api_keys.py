"""API keys: how a request's key is read and recognised without keeping the keys themselves."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from slos_serve.vllm_plugin.asgi import Scope

# How a browser is asked: any user name, the key as password.
CHALLENGE = b'Basic realm="API key as password", charset="UTF-8"'


@dataclass(frozen=True, slots=True)
class KeyDigests:
    """What keys are recognised by."""

    salt: bytes
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, keys: Sequence[str]) -> KeyDigests:
        """Of the keys themselves."""
        salt = secrets.token_bytes(16)
        return cls(salt, tuple(_digest(salt, key) for key in keys))

    def accept(self, key: str) -> bool:
        """Whether it is one of the keys; takes as long for every key."""
        given = _digest(self.salt, key)
        accepted = False
        for digest in self.digests:
            accepted |= hmac.compare_digest(given, digest)
        return accepted


def bearer_key(scope: Scope) -> str:
    """The key of ``Authorization: Bearer KEY``; empty without one."""
    scheme, value = _authorization(scope)
    return value if scheme == "bearer" else ""


def browser_key(scope: Scope) -> str:
    """As :func:`bearer_key`; also the password that a browser asked its user for."""
    scheme, value = _authorization(scope)
    if scheme != "basic":
        return value if scheme == "bearer" else ""
    try:
        return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _authorization(scope: Scope) -> tuple[str, str]:
    for name, value in scope["headers"]:
        if name.lower() == b"authorization":
            scheme, _, rest = value.decode("latin-1").partition(" ")
            return scheme.lower(), rest.strip()
    return "", ""


def _digest(salt: bytes, key: str) -> bytes:
    return hmac.new(salt, key.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
