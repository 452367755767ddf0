"""Versions of the class file: which one a request was judged by, so that the engine judges it by the same.

A version is what requests are judged by: the classes, and the sections ``trust:`` and ``map:``.

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
from dataclasses import dataclass, field
from pathlib import Path

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet
from slos_serve.core.tiers import TierMap
from slos_serve.core.trust import Trust
from slos_serve.files.class_file import ClassFile, load_class_file
from slos_serve.vllm_plugin.front.link import socket_path

# Key of a request's extra arguments, without the prefix of clients' keys. The API process overwrites a client's value.
VERSION_KEY = "slos_serve_class_version"
MOST_KEPT = 8
_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class ClassVersion:
    """What requests are judged by, as of one reading of the file.

    Attributes:
        classes: promises by name.
        digest: names the version; empty for the one that the server started with.
        trust: who may ask for what.
        tiers: the classes that fields and headers of others stand for.
    """

    classes: ClassSet
    digest: str = ""
    trust: Trust = field(default_factory=Trust)
    tiers: TierMap = field(default_factory=TierMap)


def version_of(found: ClassFile, digest: str = "", *, custom_numbers: bool = True) -> ClassVersion:
    """The version that a class file is.

    Args:
        custom_numbers: off where the server takes the names of classes only.
    """
    return ClassVersion(found.classes, digest, found.trust.allowing(custom_numbers), found.tiers)


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
        first: the one that the server started with.
        process: the API process; ``None`` where none judges requests.
        custom_numbers: see :func:`version_of`.
    """

    def __init__(self, first: ClassVersion, process: int | None, *, custom_numbers: bool = True) -> None:
        self._first = first
        self._process = process
        self._custom_numbers = custom_numbers
        self._known: dict[str, ClassVersion] = {}

    def version_of(self, extra_args: Mapping[str, object] | None) -> ClassVersion:
        """The version that a request was judged by.

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
        found = version_of(load_class_file(path), str(digest), custom_numbers=self._custom_numbers)
        self._known[found.digest] = found
        if len(self._known) > MOST_KEPT:
            del self._known[next(iter(self._known))]
        return found
