"""Promises between tenants on vLLM's real scheduler: one that sends ten times as much does not take them all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from slos_serve.bench.requests import BenchRequest
from slos_serve.vllm_plugin.seal import SEAL_KEY_ENV, Seal
from tests.vllm.dry_load import Start, events
from tests.vllm.told_load import ToldLoad

SECRET = "k" * 32
FILE = """
classes:
  chat: {ttft_ms: 1000, tpot_ms: 100, when_full: %s}
scheduler: {fairness: %s}
trust:
  tenant_header: x-tenant
  tenants: {crowd: {}, lone: {}}
"""


@dataclass(frozen=True)
class Promised:
    """Of what each tenant asked for: how many, and how many were promised and kept."""

    asked: Counter[str]
    kept: Counter[str]

    def share(self, tenant: str) -> float:
        return self.kept[tenant] / self.asked[tenant]


class TenantsLoad(ToldLoad):
    """Requests are named after their tenant."""

    def fields(self, one: BenchRequest) -> dict[str, Any]:
        tenant = one.request_id.partition("-")[0]
        return {"slo_class": one.slo_class, "slo_tenant": Seal(SECRET.encode()).sealed(tenant)}


def load(rate: float = 40.0, seconds: float = 8.0) -> list[BenchRequest]:
    """More than can be promised; ``crowd`` sends ten parts and ``lone`` one."""
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(1.0 / rate, int(rate * seconds))).tolist()
    names = ["lone" if number % 11 == 5 else "crowd" for number in range(len(arrivals))]
    return [
        BenchRequest(f"{name}-{number}", arrival_s, "w " * int(rng.integers(200, 1800)), 30, "chat")
        for number, (name, arrival_s) in enumerate(zip(names, arrivals, strict=True))
    ]


def serve(start: Start, folder: Path, fairness: float, *, told: bool, when_full: str = "best_effort") -> Promised:
    """The load on an engine, with a front end that tells clients their verdicts or without."""
    (folder / "classes.yaml").write_text(FILE % (when_full, fairness), encoding="utf-8")
    (folder / "events.jsonl").unlink(missing_ok=True)
    engine, requests = start(num_blocks=4000), load()
    several = TenantsLoad(engine, folder)
    if not told:
        engine.scheduler._slo_desk._front = None
    several.run(requests, {"chat": 1.0})
    asked, kept = Counter(one.request_id.partition("-")[0] for one in requests), Counter[str]()
    for event in events(folder, "request"):
        kept[event["request_id"].partition("-")[0]] += event["verdict"] == "admitted" and event["ttft_ok"]
    return Promised(asked, kept)


@pytest.fixture
def trusting(start: Start, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv(SEAL_KEY_ENV, SECRET)
    return start


@pytest.mark.parametrize(("told", "when_full"), [(False, "best_effort"), (True, "best_effort"), (True, "reject")])
def test_a_tenant_that_sends_a_tenth_is_promised_twice_as_much_of_it(
    trusting: Start, tmp_path: Path, told: bool, when_full: str
) -> None:
    without, found = (serve(trusting, tmp_path, fairness, told=told, when_full=when_full) for fairness in (0.0, 0.7))
    assert without.share("lone") < 0.35, "as any other request"
    assert found.share("lone") > 0.5 > found.share("crowd") + 0.15
    assert found.kept.total() > 0.93 * without.kept.total(), "all together lose little"
