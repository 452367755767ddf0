"""How the scheduler knows who asks: the middleware seals the tenant's name, the scheduler opens the seal.

A request reaches the engine with ``slo_tenant`` in its ``vllm_xargs``: the name and a keyed digest of it. Only the
server's own processes have the key, so a client that writes the field itself, on whichever route, is nobody. The key is
made at start, in a file of this user beside the sockets of :mod:`slos_serve.vllm_plugin.front.link`, under the name of
the process that started the server; ``SLOS_SERVE_SEAL_KEY`` gives it where front end and engine share no machine.
"""

from __future__ import annotations

import hashlib
import hmac
import multiprocessing
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from slos_serve.core.errors import InvalidFieldError
from slos_serve.vllm_plugin.front.link import socket_path

SEAL_KEY_ENV = "SLOS_SERVE_SEAL_KEY"
LEAST_KEY_CHARS = 32
_DIGEST_CHARS = 43


class Seal:
    """Seals tenants' names and opens them again.

    Args:
        key: secret of one server.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sealed(self, tenant: str) -> str:
        """The name with its digest."""
        return f"{tenant} {self._digest(tenant)}"

    def opened(self, text: str | None) -> str | None:
        """The name that was sealed; ``None`` for anything else."""
        if text is None:
            return None
        tenant, _, digest = text.rpartition(" ")
        return tenant if hmac.compare_digest(digest.encode(), self._digest(tenant).encode()) else None

    def _digest(self, tenant: str) -> str:
        return hmac.new(self._key, b"slo_tenant " + tenant.encode(), hashlib.sha256).hexdigest()[:_DIGEST_CHARS]


def server_process() -> int:
    """The process that started this server: vLLM's API process, or the parent of several."""
    parent = multiprocessing.parent_process()
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def seal_of(environment: Mapping[str, str], process: int | None = None, *, may_make: bool = True) -> Seal:
    """The seal of a server; the same in each of its processes.

    Args:
        environment: may have the key.
        process: that the key's file is named after; ``None`` for :func:`server_process`.
        may_make: a key may be made; False where front end and engine share no file.

    Raises:
        InvalidFieldError: the key given is too short, or no file can be had for one.
    """
    given = environment.get(SEAL_KEY_ENV, "")
    if given:
        if len(given) < LEAST_KEY_CHARS:
            allowed = f"at least {LEAST_KEY_CHARS} characters"
            raise InvalidFieldError(SEAL_KEY_ENV, f"{len(given)} characters", allowed)
        return Seal(given.encode())
    if not may_make:
        raise InvalidFieldError(SEAL_KEY_ENV, "", "a key on every node, because the class file names tenants")
    path = socket_path("seal", server_process() if process is None else process)
    try:
        if path is None:
            raise OSError("no folder that only this user can read")
        return Seal(_key_in(path))
    except OSError as error:
        allowed = f"a key in this variable, because the class file names tenants and no key file can be kept: {error}"
        raise InvalidFieldError(SEAL_KEY_ENV, "", allowed) from error


def _key_in(path: Path) -> bytes:
    """The key in a file; made by whoever comes first. A link makes it appear whole."""
    own = path.with_suffix(f".{os.getpid()}.new")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
    with suppress(FileExistsError):
        os.link(own, path)
    own.unlink()
    key = path.read_bytes()
    if len(key) < LEAST_KEY_CHARS:
        raise OSError(f"{path} holds no key")
    return key
