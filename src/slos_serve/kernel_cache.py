"""Where compiled kernels are kept: a folder named by the digest of the sources, so that none outlives its source.

numba looks at a kernel's own file only: a kernel that calls one of another file would keep its old answer when that
file changes. The package imports this before anything of it imports numba.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

VARIABLE = "NUMBA_CACHE_DIR"


class KernelCache(NamedTuple):
    """What became of the cache.

    Attributes:
        folder: where kernels are kept, ``None`` where they are compiled anew in every process.
        reason: why it is there, or why there is none.
    """

    folder: Path | None
    reason: str


def kernel_sources(package: Path) -> list[Path]:
    """Files that kernels are compiled from: those with kernels, and the modules of the package that these import."""
    found: set[Path] = set()
    to_read = [path for path in package.glob("*/*.py") if "njit" in path.read_text(encoding="utf-8")]
    while to_read:
        path = to_read.pop()
        if path in found:
            continue
        found.add(path)
        imported = re.compile(rf"^from {package.name}\.([\w.]+) import", re.MULTILINE)
        for name in imported.findall(path.read_text(encoding="utf-8")):
            module = package / (name.replace(".", "/") + ".py")
            if module.is_file():
                to_read.append(module)
    return sorted(found)


def source_digest(package: Path) -> str:
    """Twelve hexadecimal digits over the sources that kernels come from."""
    digest = hashlib.blake2b(digest_size=6)
    for path in kernel_sources(package):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def use_kernel_cache() -> KernelCache:
    """Point numba at a folder of these sources; an operator's own ``NUMBA_CACHE_DIR`` stays as it is.

    Without a folder that can be written kernels are compiled in every process, which takes about a minute.
    """
    own = os.environ.get(VARIABLE)
    if own:
        return KernelCache(Path(own), f"{VARIABLE} is set")
    digest = source_digest(Path(__file__).parent)
    refused = []
    for base in _bases():
        folder = base / "kernels" / digest
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            refused.append(f"{folder}: {error.strerror}")
            continue
        os.environ[VARIABLE] = str(folder)
        if "numba" in sys.modules:
            sys.modules["numba"].config.CACHE_DIR = str(folder)
        return KernelCache(folder, f"first folder that can be written of {[str(base) for base in _bases()]}")
    _compile_without_cache()
    return KernelCache(None, f"no folder can be written ({'; '.join(refused)})")


def _bases() -> list[Path]:
    """Folders to try, first the one that the operator names."""
    bases = []
    if os.environ.get("SLOS_SERVE_CACHE"):
        bases.append(Path(os.environ["SLOS_SERVE_CACHE"]))
    if os.environ.get("XDG_CACHE_HOME"):
        bases.append(Path(os.environ["XDG_CACHE_HOME"]) / "slos-serve")
    if os.environ.get("HOME"):
        bases.append(Path(os.environ["HOME"]) / ".cache" / "slos-serve")
    temporary = [name for name in (os.environ.get("TMPDIR"), "/tmp") if name]
    return bases + [Path(name) / f"slos-serve-{os.getuid()}" for name in temporary]


def _compile_without_cache() -> None:
    """numba refuses ``cache=True`` where it finds no folder: make it compile without one instead."""
    dispatcher = importlib.import_module("numba.core.dispatcher")
    dispatcher.Dispatcher.enable_caching = lambda _self: None
