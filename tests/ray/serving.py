"""A whole `slos-serve serve --replicas` with folders of its own, so that everything it writes can be looked at."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from slos_serve.files.cache_folder import cache_folder
from tests.ray.processes import below

READY_WITHIN_S = 400.0
END_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that runs.

    Attributes:
        process: the command.
        folder: where its output and Ray's files are.
        ray_folder: Ray's own, of a short name: sockets lie in it.
        started_s: when, in seconds of the epoch.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    ray_folder: Path
    started_s: float

    @property
    def pid(self) -> int:
        """Of the command."""
        return self.process.pid

    def wait_until_ready(self, url: str, verify: ssl.SSLContext | bool = True) -> None:
        """Return when a replica answers."""
        for _ in range(int(READY_WITHIN_S)):
            assert self.process.poll() is None, self.output()[-3000:]
            try:
                if httpx.get(f"{url}/health", verify=verify, timeout=5.0).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(1.0)
        raise AssertionError(f"not ready:\n{self.output()[-3000:]}")

    def output(self) -> str:
        """What it wrote to its terminal."""
        return (self.folder / "output.log").read_text(encoding="utf-8", errors="replace")

    def files(self) -> Iterator[Path]:
        """Everything that it wrote."""
        for root in (self.folder, self.ray_folder, cache_folder()):
            for path in root.rglob("*"):
                if path.is_file() and path.stat().st_mtime >= self.started_s:
                    yield path


@contextmanager
def serving(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Iterator[Serving]:
    """Run ``slos-serve COMMAND`` and end it."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        told = {**os.environ, **environment, "RAY_TMPDIR": ray_folder, "VLLM_CPU_KVCACHE_SPACE": "1"}
        started_s = time.time() - 1.0
        with (folder / "output.log").open("wb") as output:
            words = [sys.executable, "-c", "from slos_serve.cli.main import app; app()", *command]
            process = subprocess.Popen(words, env=told, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield Serving(process, folder, Path(ray_folder), started_s)
        finally:
            # Told first even when a test failed: it ends its own processes, which are in groups of their own.
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_WITHIN_S)
            except subprocess.TimeoutExpired:
                for pid in reversed(below(process.pid)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise
