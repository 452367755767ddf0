"""Tenants on a real server: the front end seals who asks, the engine core in its own process opens the seal."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest

vllm = pytest.importorskip("vllm")

from slos_serve.launch.cpu_engine import CPU_ENVIRONMENT, cpu_engine_args
from slos_serve.launch.server import ServerProcess
from slos_serve.vllm_plugin.config import PluginConfig
from tests.cpu_profile import save_rough_profile

pytestmark = [pytest.mark.engine, pytest.mark.long]
TRUST = """
classes:
  gold: {ttft_ms: 20000, tpot_ms: 5000}
trust:
  tenant_header: x-tenant
  tenants: {team-a: {classes: [gold]}}
"""


def test_the_engine_promises_a_tenant_what_the_front_end_lets_in(cpu_model: str, tmp_path: Path) -> None:
    save_rough_profile(cpu_model, tmp_path)
    (tmp_path / "classes.yaml").write_text(TRUST, encoding="utf-8")
    plugin = PluginConfig(
        classes_path=tmp_path / "classes.yaml",
        profile_path=tmp_path / "profile.json",
        events_path=tmp_path / "events.jsonl",
    )
    vllm_args = (*cpu_engine_args(), "--served-model-name", "m")
    body = {"model": "m", "prompt": "Hi", "max_tokens": 3}
    with ServerProcess(cpu_model, vllm_args, plugin=plugin, environment=CPU_ENVIRONMENT) as server:
        url = f"{server.base_url}/v1/completions"

        def status(headers: dict[str, str], **fields: object) -> int:
            return httpx.post(url, json={**body, **fields}, headers=headers, timeout=120.0).status_code

        assert status({"x-tenant": "team-a", "x-slo-class": "gold"}) == 200
        assert status({"x-tenant": "team-b", "x-slo-class": "gold"}) == 403
        assert status({"x-tenant": "team-b"}, vllm_xargs={"slo_class": "gold"}) == 403
        assert status({}, vllm_xargs={"slo_class": "gold", "slo_tenant": "team-a"}) == 400
        deadline_s = time.monotonic() + 30.0
        while not (found := _verdicts(tmp_path / "events.jsonl")):
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
    assert found == ["admitted"]


def _verdicts(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    events = [json.loads(line) for line in lines]
    return [event["verdict"] for event in events if event["kind"] == "request"]
