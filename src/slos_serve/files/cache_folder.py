"""The one rule for where this package keeps what it can make again: profiles, converted models, compiled kernels.

``SLOS_SERVE_CACHE`` if set; else ``slos-serve`` in ``XDG_CACHE_HOME`` or ``~/.cache``; where that cannot be written (a
container with a read-only file system or without a home), a folder of this user among the temporary files. A cache that
had to move is said once a process, because what is kept there is gone with the container.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from slos_serve.core.errors import InvalidFieldError

CACHE_ENV = "SLOS_SERVE_CACHE"
# Memory; there where a container mounts nothing else.
_LAST_RESORT = Path("/dev/shm")
_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The cache folder, which exists or can be made.

    Raises:
        InvalidFieldError: no folder can be written.
    """
    given = os.environ.get(CACHE_ENV)
    if given:
        return Path(given).expanduser()
    wanted = users_cache_folder() / "slos-serve"
    if can_write(wanted):
        return wanted
    return _fallback(str(wanted))


def lookup_folders() -> list[Path]:
    """Cache folders to look into: the one that is written to, then the usual one of an image that is only read."""
    usual = users_cache_folder() / "slos-serve"
    found = [cache_folder()]
    return [*found, usual] if not os.environ.get(CACHE_ENV) and usual not in found else found


def kept_in_cache(name: str) -> Path:
    """Where ``name`` is kept, in the first folder that has it; where to make it when none has."""
    found = [folder / name for folder in lookup_folders()]
    return next((path for path in found if path.exists()), found[0])


def users_cache_folder() -> Path:
    """``XDG_CACHE_HOME`` where it is set and absolute, else ``~/.cache``; need not be writable."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without an entry in the password file and without HOME
        return Path("/nonexistent/.cache")


def temporary_root() -> Path:
    """A folder that temporary files can be made in.

    Raises:
        InvalidFieldError: there is none.
    """
    for folder in _temporary_roots():
        if can_write(folder):
            return folder
    raise InvalidFieldError("TMPDIR", os.environ.get("TMPDIR"), "a folder that can be written (mount one at /tmp)")


def can_write(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or in the nearest parent that exists, in which it would be made."""
    at = folder
    while not at.exists() and at != at.parent:
        at = at.parent
    return at.is_dir() and os.access(at, os.W_OK | os.X_OK)


def _temporary_roots() -> Iterator[Path]:
    given = os.environ.get("TMPDIR")
    if given:
        yield Path(given)
    with suppress(FileNotFoundError):
        yield Path(tempfile.gettempdir())
    yield _LAST_RESORT


@cache
def _fallback(wanted: str) -> Path:
    folder = temporary_root() / f"slos-serve-{os.getuid()}"
    _logger.warning(
        "%s cannot be written; caches are kept in %s and end with this container. Set %s to a folder that stays.",
        wanted,
        folder,
        CACHE_ENV,
    )
    return folder
