"""Folders that a server and its libraries write to, where the usual ones cannot be written.

A container may have a read-only file system, no home, or a user without an entry in the password file. Every library
that vLLM loads has a cache folder of its own and most fail without one. Each that cannot write where it would is
pointed to a folder below :func:`slos_serve.files.cache_folder.cache_folder` by its own variable; variables that are
set stay. Model weights stay where they are: a hub cache that exists is read, also when it is read-only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from slos_serve.files.cache_folder import cache_folder, can_write, temporary_root, users_cache_folder

HUB_ENV = "HF_HOME"
# Variable -> the library's own folder below the user's cache folder (or home, with "~"), and ours below the cache.
_FOLDERS: Mapping[str, tuple[str, str]] = {
    "VLLM_CACHE_ROOT": ("vllm", "vllm"),
    "VLLM_CONFIG_ROOT": ("~/.config/vllm", "vllm-config"),
    "TRITON_HOME": ("~", "triton"),
    "FLASHINFER_WORKSPACE_BASE": ("~", "flashinfer"),
    "CUDA_CACHE_PATH": ("~/.nv/ComputeCache", "cuda"),
    "MPLCONFIGDIR": ("~/.config/matplotlib", "matplotlib"),
}
# These lie among the temporary files or beside the package, so they follow whenever a home is missing.
_WITH_HOME: Mapping[str, str] = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "NUMBA_CACHE_DIR": "numba"}


def folder_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that point libraries to folders that can be written; empty where nothing has to move.

    Raises:
        InvalidFieldError: no folder can be written at all.
    """
    found: dict[str, str] = {}
    home = users_cache_folder().parent
    for name, (usual, ours) in _FOLDERS.items():
        folder = home / usual.removeprefix("~").lstrip("/") if usual.startswith("~") else users_cache_folder() / usual
        if name not in environment and not can_write(folder):
            found[name] = str(cache_folder() / ours)
    if found:
        found |= {name: str(cache_folder() / ours) for name, ours in _WITH_HOME.items() if name not in environment}
    hub = users_cache_folder() / "huggingface"
    if not {HUB_ENV, "HF_HUB_CACHE"} & set(environment) and not hub.is_dir() and not can_write(hub):
        found[HUB_ENV] = str(cache_folder() / "huggingface")
    root = temporary_root()
    if not _is_default_temporary(root):
        found["TMPDIR"] = str(root)
    return found


def prepare_folders(environment: MutableMapping[str, str], announce: Callable[[str], None]) -> None:
    """Set :func:`folder_variables` for this process and those that it starts, and say so in one line.

    Raises:
        InvalidFieldError: no folder can be written at all.
    """
    found = folder_variables(environment)
    if not found:
        return
    environment.update(found)
    for folder in found.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    if "TMPDIR" in found:
        tempfile.tempdir = found["TMPDIR"]
    announce(f"warning: the home cannot be written; {', '.join(sorted(found))} point below {cache_folder()}")


def _is_default_temporary(root: Path) -> bool:
    try:
        return Path(tempfile.gettempdir()) == root
    except FileNotFoundError:
        return False
