"""A request through a prefill and a decode server on the real CPU engine: KV goes between them through files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from examples.prefill_decode import PROMPT
from slos_serve.launch.cpu_engine import CPU_ENVIRONMENT, cpu_engine_args
from slos_serve.launch.server import ServerProcess
from slos_serve.vllm_plugin.config import PluginConfig
from tests.cpu_profile import save_rough_profile

pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.example_connector")

pytestmark = [pytest.mark.engine, pytest.mark.long]

ROOT = Path(__file__).parents[2]
MODEL = "smollm2"
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, cpu_model: str) -> Iterator[dict[str, ServerProcess]]:
    """One server of each role, with the plug-in, and vLLM's connector that keeps KV in a folder."""
    folder = tmp_path_factory.mktemp("prefill-decode")
    save_rough_profile(cpu_model, folder)
    with ExitStack() as stack:
        running = {}
        for name, role in ROLES.items():
            transfer = {
                "kv_connector": "ExampleConnector",
                "kv_role": role,
                "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
            }
            plugin = PluginConfig(
                classes_path=ROOT / "examples" / "classes.yaml",
                profile_path=folder / "profile.json",
                events_path=folder / f"{name}.jsonl",
            )
            args = (*cpu_engine_args(), "--served-model-name", MODEL, "--kv-transfer-config", json.dumps(transfer))
            server = ServerProcess(cpu_model, args, plugin=plugin, environment=CPU_ENVIRONMENT)
            running[name] = stack.enter_context(server)
        yield running


def _sum(server: ServerProcess, name: str) -> float:
    """A metric of a server, its labels added up."""
    text = httpx.get(f"{server.base_url}/metrics", timeout=30.0).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(one.value for one in samples if one.name == name)


def _told(server: ServerProcess, name: str, at_least: float) -> float:
    """A metric once it has come as far: events are counted behind the engine's back."""
    until_s = time.monotonic() + 30.0
    while _sum(server, name) < at_least and time.monotonic() < until_s:
        time.sleep(0.2)
    return _sum(server, name)


def _wait_for_verdicts(server: ServerProcess) -> None:
    """Return once the front end judges requests: its kernels are loaded then."""
    body = {"model": MODEL, "prompt": "Bread, salt and maps of the winter. " * 20, "max_tokens": 1}  # whole blocks
    until_s = time.monotonic() + 180.0
    while time.monotonic() < until_s:
        answer = httpx.post(
            f"{server.base_url}/v1/completions", json=body, headers={"x-slo-class": "none"}, timeout=60.0
        )
        if "x-slo-verdict" in answer.headers:
            return
        time.sleep(1.0)
    raise AssertionError("no verdict within three minutes")


def test_a_request_through_both_is_answered_as_by_one_and_both_keep_their_promise(
    servers: dict[str, ServerProcess],
) -> None:
    prefill, decode = servers["prefill"], servers["decode"]
    for server in (prefill, decode):
        _wait_for_verdicts(server)
    ran = subprocess.run(
        [sys.executable, "examples/prefill_decode.py"],
        cwd=ROOT,
        env={**os.environ, "PREFILL_URL": prefill.base_url, "DECODE_URL": decode.base_url, "MODEL": MODEL},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    said = dict(line.split(": ", 1) for line in ran.stdout.splitlines()[:3])
    assert said["prefill"] == said["decode"] == "admitted"
    # Whole blocks of the prompt came through the connector; the rest was computed by the decode server.
    assert _sum(decode, "vllm:external_prefix_cache_hits_total") >= 128
    for server in (prefill, decode):
        assert _told(server, "slos_serve:attained_total", 1.0) == 1.0
        assert _sum(server, "slos_serve:slo_violation_total") == 0.0
        assert _sum(server, "slos_serve:armed") == 1.0

    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 32, "temperature": 0.0}
    no_promise = {"x-slo-class": "none"}
    alone = httpx.post(f"{prefill.base_url}/v1/completions", json=body, headers=no_promise, timeout=120.0).json()
    text = alone["choices"][0]["text"]
    assert text.strip() and ran.stdout.split("answer: ", 1)[1].rstrip("\n") == text.rstrip("\n")
