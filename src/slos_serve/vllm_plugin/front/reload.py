"""The class file is read again when it changes or at SIGHUP, while the server runs.

A file is taken once it has been the same for two looks, so one that is being written is left alone. A file that cannot
be used changes nothing: the classes stay as they were, the log names file and line, and a counter grows. Classes,
``trust:`` and ``map:`` change together. Requests that came before keep the promise that they were given, and what a
tenant has used of its budget counts on. The section ``scheduler:`` and the size of the planner's statistics are fixed
at start: a new class shares the length forecast and the label of ``custom`` until a restart.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.class_file import parse_class_file
from slos_serve.vllm_plugin.class_versions import ClassVersion, digest_of, keep_copy, version_of
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.seal import seal_of

LOOK_EVERY_S = 1.0
_logger = logging.getLogger("vllm.slos_serve")
Result = Literal["taken", "kept_old"]
_Stamp = tuple[int, int, int]


class ClassFileWatch:
    """Looks at a class file now and then.

    Args:
        config: names the file, and has what it said when the server started.
        counted: told of each changed file, whether it was taken.
        process: the API process, whose engine core is to find the versions.

    Attributes:
        current: the version that new requests are judged by. Read on the event loop, replaced by the thread that looks.
        read_again: an operator asks that the next look takes the file as it is.
    """

    def __init__(self, config: PluginConfig, counted: Callable[[Result], None], process: int | None = None) -> None:
        self.current: ClassVersion = version_of(config.class_file, custom_numbers=config.custom_numbers)
        self._config = config
        self._path = config.classes_path
        self._counted = counted
        self._process = os.getpid() if process is None else process
        self._seen = self._used = self._stamp()
        self._looked_s = 0.0
        self.read_again = False

    def look(self, now_s: float) -> bool:
        """Take the file if it has changed, or if that was asked for; whether it was taken. Cheap when called often."""
        asked, self.read_again = self.read_again, False
        if self._path is None or (now_s - self._looked_s < LOOK_EVERY_S and not asked):
            return False
        self._looked_s = now_s
        stamp = self._stamp()
        settled, self._seen = stamp == self._seen, stamp
        if not asked and (not settled or stamp == self._used):
            return False
        self._used = stamp
        if stamp is None:
            _logger.error("slos-serve: the classes stay as they were: %s is gone.", self._path)
            self._counted("kept_old")
            return False
        return self._take(self._path)

    def _stamp(self) -> _Stamp | None:
        try:
            found = None if self._path is None else self._path.stat()
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)

    def _take(self, path: Path) -> bool:
        try:
            text = path.read_text(encoding="utf-8")
            found = parse_class_file(text, str(path))
            if found.trust.knows_tenants:
                seal_of(os.environ)  # without one nobody could tell the engine who asks
        except (OSError, UnicodeDecodeError, InvalidFieldError) as error:
            _logger.error("slos-serve: the classes stay as they were: %s", error)
            self._counted("kept_old")
            return False
        if not keep_copy(text, self._process):
            _logger.error("slos-serve: the classes stay as they were: there is no safe folder to hand %s on in.", path)
            self._counted("kept_old")
            return False
        before = self.current
        self.current = version_of(found, digest_of(text), custom_numbers=self._config.custom_numbers)
        self._counted("taken")
        names = ", ".join(slo_class.name for slo_class in found.classes)
        _logger.info("slos-serve: read %s again: classes %s, default %s.", path, names, found.classes.default or "none")
        changed = {"trust": self.current.trust != before.trust, "map": self.current.tiers != before.tiers}
        for name in [name for name, differs in changed.items() if differs]:
            _logger.info("slos-serve: the section %s: of %s has changed.", name, path)
        if found.scheduler != self._config.class_file.scheduler:
            _logger.warning("slos-serve: the section scheduler: of %s takes effect at the next start.", path)
        return True
