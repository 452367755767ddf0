"""Where compiled kernels are kept (review, A6: kernels outlived the sources that they call)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import slos_serve
from slos_serve import kernel_cache
from slos_serve.kernel_cache import source_digest, use_kernel_cache

PACKAGE = Path(slos_serve.__file__).parent


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (kernel_cache.VARIABLE, "SLOS_SERVE_CACHE", "XDG_CACHE_HOME", "HOME", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_folder_is_named_by_the_sources(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv("SLOS_SERVE_CACHE", str(tmp_path))
    found = use_kernel_cache()
    assert found.folder == tmp_path / "kernels" / source_digest(PACKAGE)
    assert os.environ[kernel_cache.VARIABLE] == str(found.folder)


def test_an_operators_own_folder_is_kept(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv(kernel_cache.VARIABLE, str(tmp_path))
    assert use_kernel_cache().folder == tmp_path


def test_a_change_in_any_kernel_changes_the_folder(tmp_path: Path) -> None:
    copy = tmp_path / "slos_serve"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "profiles"))
    before = source_digest(copy)
    assert before == source_digest(PACKAGE)
    changed = copy / "planning" / "supply.py"
    changed.write_text(changed.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert source_digest(copy) != before


def test_files_without_kernels_do_not_count() -> None:
    names = {str(path.relative_to(PACKAGE)) for path in kernel_cache.kernel_sources(PACKAGE)}
    assert {"planning/state.py", "core/request.py", "perf/formula.py"} <= names
    assert "cli/main.py" not in names


def test_kernels_run_where_no_folder_can_be_written() -> None:
    """As on a read-only file system without a home: numba refuses ``cache=True`` at import there."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "import pathlib\n"
        "def refuse(*_args, **_kwargs): raise PermissionError(13, 'read-only')\n"
        "pathlib.Path.mkdir = refuse\n"
        "import slos_serve\n"
        "assert slos_serve.KERNEL_CACHE.folder is None\n"
        "assert 'read-only' in slos_serve.KERNEL_CACHE.reason\n"
        "from slos_serve.planning.state import blocks_for\n"
        "assert blocks_for(17, 16) == 2\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    command = [sys.executable, "-c", code, str(PACKAGE.parent)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
