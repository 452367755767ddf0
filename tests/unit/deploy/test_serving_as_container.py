"""A server serves as the images run it: user 10001, read-only root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from slos_serve.launch.endpoint import free_port

ROOT = Path(__file__).parents[3]
AS_CONTAINER = ROOT / "scripts" / "as_container.sh"
COMMAND = [sys.executable, "-c", "from slos_serve.cli.main import app; app()"]
READY_WITHIN_S = 500
PROFILE = ROOT / "src" / "slos_serve" / "profiles" / "smollm2-135m-cpu.json"

can_unshare = (
    os.geteuid() == 0
    and shutil.which("setpriv") is not None
    and subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0
)
pytestmark = pytest.mark.skipif(not can_unshare, reason="needs root, setpriv and a mount namespace")


@pytest.mark.long
@pytest.mark.engine
def test_a_server_serves(tmp_path: Path) -> None:
    port = free_port()
    words = ["serve", "smollm2", "--profile", str(PROFILE), "--allow-profile-mismatch"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--startup-timeout", str(READY_WITHIN_S)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (tmp_path / "output.log").open("wb") as output:
        server = subprocess.Popen([AS_CONTAINER, *COMMAND, *words], stdout=output, stderr=output, env=environment)
    try:
        for _ in range(READY_WITHIN_S):
            assert server.poll() is None, (tmp_path / "output.log").read_text(errors="replace")[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5.0).is_success:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(1.0)
        body = {"model": "smollm2", "prompt": "One, two,", "max_tokens": 4}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120.0)
        assert answer.is_success and answer.json()["usage"]["completion_tokens"] == 4
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60.0)
