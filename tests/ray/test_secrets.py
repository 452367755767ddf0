"""Keys stay secret: one real replica, with TLS and without; everything that its processes wrote or show is searched."""

from __future__ import annotations

import json
import os
import secrets
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray")
pytest.importorskip("vllm")

from slos_serve.launch.cpu_engine import cpu_engine_args
from slos_serve.launch.endpoint import free_port
from slos_serve.ray_serve.curve import STORED_AS, CurveKeys
from tests.ray.processes import below, command_line, environment_of
from tests.ray.serving import Serving, serving

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long]

MODEL = "small"
# Prints what the store of the cluster holds and where its metrics are, from a process of its own.
ASK_CLUSTER = """
import json, ray, sys
ray.init(address="auto", log_to_driver=False)
from slos_serve.ray_serve.compat import ClusterStore
ports = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]
print(json.dumps([ClusterStore().get(sys.argv[1].encode()).decode(), ports]))
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*made, *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


@pytest.mark.parametrize("tls", [False, True])
def test_a_key_is_asked_for_and_found_nowhere(
    tls: bool, profile_path: Path, certificate: tuple[Path, Path], cpu_model: str, tmp_path: Path
) -> None:
    key = f"sk-{secrets.token_hex(16)}"
    port = free_port()
    options = ["--ssl-certfile", str(certificate[0]), "--ssl-keyfile", str(certificate[1])] if tls else []
    command = ["serve", cpu_model, "--replicas", "1", "--profile", str(profile_path), *options]
    given = [*cpu_engine_args(), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    verify = ssl.create_default_context(cafile=certificate[0]) if tls else True
    with serving([*command, *given], tmp_path, {"VLLM_API_KEY": key}) as server:
        server.wait_until_ready(url, verify)
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}
        for given_key, status in ((None, 401), ("sk-0", 401), (key, 200)):
            headers = {} if given_key is None else {"authorization": f"Bearer {given_key}"}
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, verify=verify, timeout=120.0)
            assert answer.status_code == status, answer.text
            assert key not in answer.text + str(answer.headers)
        keys, ports = asked_of_cluster(server)
        searched = {"API key": key, "replicas' key": keys.replica_secret, "routers' key": keys.router_secret}
        assert not list(found_in(server.files(), searched))
        assert not list(shown(server.pid, searched))
        metrics = "".join(httpx.get(port, timeout=30.0).text for port in ports)
        assert "slos_serve" in metrics
        assert not [name for name, secret in searched.items() if secret in metrics]
    assert not list(found_in(server.files(), searched)), "written while it ended"


def asked_of_cluster(server: Serving) -> tuple[CurveKeys, list[str]]:
    """The keys that publications are encrypted with, and addresses of metrics."""
    command = [sys.executable, "-c", ASK_CLUSTER, STORED_AS.decode()]
    environment = {**os.environ, "RAY_TMPDIR": str(server.ray_folder)}
    read = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    stored, ports = json.loads(read.stdout.strip().splitlines()[-1])
    return CurveKeys.of_bytes(stored.encode()), ports


def found_in(files: Iterator[Path], searched: dict[str, str]) -> Iterator[str]:
    for path in files:
        try:
            content = path.read_bytes()
        except OSError:
            continue
        yield from (f"{name} in {path}" for name, secret in searched.items() if secret.encode() in content)


def shown(root: int, searched: dict[str, str]) -> Iterator[str]:
    """Secrets in command lines and environments of the server's processes."""
    for pid in below(root):
        texts = {"command line": command_line(pid), "environment": environment_of(pid)}
        if pid == root or "slos_serve.ray_serve.run" in texts["command line"]:
            del texts["environment"]  # where the operator put it; the kernel shows it as it was at the start
        for where, text in texts.items():
            yield from (f"{name} in {where} of {command_line(pid)}" for name, key in searched.items() if key in text)
