"""Versions of the class file: which one a request was judged by, so that the engine judges it by the same.

The API process reads a class file again when it changes (:mod:`slos_serve.vllm_plugin.front.reload`) and keeps a copy
of each version in the private folder of its sockets. A request judged by a version other than the first carries the
version's digest to the engine core, which reads that copy. So both take a new file at the same request, and a file that
changes meanwhile, or is broken, is never seen by one of them alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet
from slos_serve.files.class_file import load_classes
from slos_serve.vllm_plugin.front.link import socket_path

# Key of a request's extra arguments, without the prefix of clients' keys. The API process overwrites a client's value.
VERSION_KEY = "slos_serve_class_version"
MOST_KEPT = 8
_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class ClassVersion:
    """Classes as of one reading of the file.

    Attributes:
        classes: promises by name.
        digest: names the version; empty for the one that the server started with.
    """

    classes: ClassSet
    digest: str = ""


def digest_of(text: str) -> str:
    """What names the version that a class file's text is."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def keep_copy(text: str, process: int) -> bool:
    """Keep a version's text where this API process's engine core finds it; False where there is no safe folder."""
    path = socket_path(f"classes-{digest_of(text)}", process)
    if path is None:
        return False
    unfinished = path.with_suffix(".new")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        return False
    return True


class ClassVersions:
    """The versions that an engine core knows.

    Args:
        first: the classes that the server started with.
        process: the API process; ``None`` where none judges requests.
    """

    def __init__(self, first: ClassSet, process: int | None) -> None:
        self._first = first
        self._process = process
        self._known: dict[str, ClassSet] = {}

    def classes_of(self, extra_args: Mapping[str, object] | None) -> ClassSet:
        """The classes that a request was judged by.

        Raises:
            InvalidFieldError: there is no such version.
        """
        digest = (extra_args or {}).get(VERSION_KEY)
        if digest is None or self._process is None:
            return self._first
        known = self._known.get(digest) if isinstance(digest, str) else None
        if known is not None:
            return known
        path: Path | None = None
        if isinstance(digest, str) and _DIGEST.fullmatch(digest):
            path = socket_path(f"classes-{digest}", self._process)
        if path is None or not path.is_file():
            raise InvalidFieldError(VERSION_KEY, digest, "a version of the class file that this server has read")
        found = self._known[str(digest)] = load_classes(path)
        if len(self._known) > MOST_KEPT:
            del self._known[next(iter(self._known))]
        return found
