"""The start path where nothing can be written: a read-only file system, no home, a user nobody knows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files import cache_folder as cache
from slos_serve.files.cache_folder import (
    cache_folder,
    can_write,
    kept_in_cache,
    lookup_folders,
    temporary_root,
    users_cache_folder,
)
from slos_serve.launch import folders
from slos_serve.launch.cpu_model import models_folder
from slos_serve.launch.folders import folder_variables, prepare_folders

ROOT = Path(__file__).parents[3]
KERNELS = Path("/dev/shm") / f"slos-serve-test-kernels-{os.getuid()}"

# All that writes on the way from the command to a server that answers, then what a server's libraries write.
PROGRAM = """
import http.server, os, sys, tempfile
from pathlib import Path
if sys.argv[1:2] == ["server"]:
    for name in ("VLLM_CACHE_ROOT", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR", "HF_HOME"):
        (Path(os.environ[name]) / "written").write_text("x")
    tempfile.mkdtemp()
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[3])), Handler).serve_forever()
from slos_serve.files.engine_identity import EngineIdentity
from slos_serve.files.profile_file import default_profile_path
from slos_serve.launch.cpu_model import convert_once, models_folder
from slos_serve.launch.endpoint import Endpoint, free_port
from slos_serve.launch.folders import prepare_folders
from slos_serve.launch.server import Patience, ServerProcess
prepare_folders(os.environ, print)
path = default_profile_path(EngineIdentity("m", "d", "1", "f", 1))
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text("{}")
convert_once(Path("w"), models_folder() / "m-1", lambda _, folder: folder.mkdir())
port = free_port()
command = [sys.executable, sys.argv[0], "server", "--port", str(port)]
endpoint = Endpoint(host="127.0.0.1", port=port)
with ServerProcess("m", command=command, endpoint=endpoint, patience=Patience(60.0)):
    print("served", path, models_folder())
"""

# Every mount but the kernel's own and shared memory, which containers have too; then the command.
READ_ONLY = """
mount --make-rprivate / || exit 1
cut -d' ' -f2 /proc/self/mounts | while read -r at; do
    case $at in /dev*|/proc*|/sys*) ;; *) mount -o remount,bind,ro "$at" 2>/dev/null ;; esac
done
touch /tmp/probe "$HOME/probe" 2>/dev/null && exit 1
exec "$@"
"""


def program(tmp_path: Path) -> Path:
    path = tmp_path / "start.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


def environment(**given: str) -> dict[str, str]:
    kept = ("PATH", "LD_LIBRARY_PATH", "LANG")
    found = {name: os.environ[name] for name in kept if name in os.environ}
    # Where the package's own kernels go is settled when it is imported, before the launcher runs.
    found["NUMBA_CACHE_DIR"] = str(KERNELS)
    KERNELS.mkdir(exist_ok=True)
    return {**found, "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1", **given}


def read_only_mounts() -> bool:
    """Whether this user may make a read-only view of the file system for one command."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", "-m", "sh", "-c", READ_ONLY, "sh", "true"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.skipif(not read_only_mounts(), reason="needs the right to mount")
def test_a_read_only_file_system_starts(tmp_path: Path) -> None:
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", sys.executable, str(program(tmp_path))],
        env=environment(HOME="/root"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert "served /dev/shm/slos-serve-0/profiles/" in ran.stdout
    assert "warning: the home cannot be written" in ran.stdout
    for folder in (Path("/dev/shm/slos-serve-0"), KERNELS):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(os.getuid() == 0 and shutil.which("setpriv") is None, reason="root writes everywhere")
@pytest.mark.parametrize("home", ["closed", "file"])
def test_a_user_without_a_home_starts(tmp_path: Path, home: str) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "file").touch()
    # Root minds permissions once it has lost the right to override them.
    obedient = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    ran = subprocess.run(
        [*obedient, sys.executable, str(program(tmp_path))],
        env=environment(TMPDIR=str(tmp_path / "tmp"), HOME=str(tmp_path / home)),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert f"served {tmp_path}/tmp/slos-serve-{os.getuid()}/profiles/" in ran.stdout
    assert ran.stdout.count("warning: ") == 1 and "SLOS_SERVE_CACHE" in ran.stderr


def test_a_user_whom_the_password_file_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert users_cache_folder() == Path("/nonexistent/.cache")


def test_nothing_moves_where_the_home_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SLOS_SERVE_CACHE", raising=False)
    assert folder_variables({}) == {}
    assert cache_folder() == tmp_path / ".cache" / "slos-serve"


def test_variables_that_are_set_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLOS_SERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(folders, "can_write", lambda _: False)
    given = {"VLLM_CACHE_ROOT": "/mine", "HF_HUB_CACHE": "/models", "NUMBA_CACHE_DIR": "/kernels"}
    environment, said = dict(given), list[str]()
    prepare_folders(environment, said.append)
    assert {name: environment[name] for name in given} == given
    assert environment["TRITON_HOME"] == str(tmp_path / "triton") and (tmp_path / "triton").is_dir()
    assert "HF_HOME" not in environment
    assert len(said) == 1 and "TRITON_HOME" in said[0] and "NUMBA_CACHE_DIR" not in said[0]


def test_one_rule_for_every_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLOS_SERVE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert models_folder() == tmp_path / "mine" / "models"


def test_what_an_image_brings_is_read_where_it_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "image"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SLOS_SERVE_CACHE", raising=False)
    kept = tmp_path / "image" / "slos-serve" / "models" / "m-1"
    kept.mkdir(parents=True)
    monkeypatch.setattr(cache, "can_write", lambda folder: not folder.is_relative_to(tmp_path / "image"))
    assert models_folder() == tmp_path / f"slos-serve-{os.getuid()}" / "models"
    assert kept_in_cache("models/m-1") == kept
    assert kept_in_cache("models/m-2") == models_folder() / "m-2"
    assert lookup_folders() == [models_folder().parent, kept.parents[1]]


def test_nowhere_to_write_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "can_write", lambda _: False)
    with pytest.raises(InvalidFieldError, match=r"TMPDIR.*mount one at /tmp"):
        temporary_root()


def test_a_folder_that_would_be_made_in_one_that_can_be_written(tmp_path: Path) -> None:
    assert can_write(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    assert not can_write(tmp_path / "file")
    assert not can_write(tmp_path / "file" / "below")
