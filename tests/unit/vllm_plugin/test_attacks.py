"""A table of attacks on the front end: each is refused or bounded, and others are served as before.

What reaches the engine around the front end is judged there again: tests/vllm/test_trust.py.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from slos_serve.core.tasks import TaskPromise
from slos_serve.core.trust import DeniedError, Quotas
from slos_serve.files.class_file import parse_class_file
from slos_serve.perf.tasks import CallAsked, TaskBook, TaskKey
from slos_serve.routing.sessions import Sessions
from slos_serve.vllm_plugin import middleware
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.gate import MOST_WARNINGS, Gate
from slos_serve.vllm_plugin.middleware import SLOMiddleware
from slos_serve.vllm_plugin.seal import SEAL_KEY_ENV, Seal
from tests.unit.vllm_plugin.test_middleware import Engine, Wire

SECRET = "k" * 32
DIGEST = hashlib.sha256(b"key-of-b").hexdigest()
TRUST = f"""
classes:
  gold: {{ttft_ms: 500, tpot_ms: 30}}
  chat: {{ttft_ms: 1000, tpot_ms: 100}}
  batch: {{}}
trust:
  tenant_header: x-tenant
  api_keys: {{team-b: {DIGEST}}}
  tenants:
    team-a: {{classes: [gold, chat], custom_numbers: true}}
    team-b: {{classes: [chat], promises_per_minute: 2}}
  others: {{classes: [chat], promises_per_minute: 1}}
map:
  service_tier: {{priority: gold}}
  x-llm-d-inference-objective: {{critical: gold}}
"""
AS_A = {"x-tenant": "team-a"}
BY_KEY = {"authorization": "Bearer key-of-b"}


@dataclass
class Front:
    """The middleware of a server, and what its engine got last."""

    served: SLOMiddleware
    engine: Engine = field(default_factory=Engine)

    async def ask(self, headers: list[tuple[str, str]] | dict[str, str], body: bytes = b'{"prompt": "x"}') -> Wire:
        """One request to the front end; ``engine`` is as fresh as it."""
        self.engine.calls, self.engine.body = 0, b""
        several = list(headers.items()) if isinstance(headers, dict) else headers
        wire = Wire([body[at : at + 65536] for at in range(0, max(len(body), 1), 65536)])
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in several]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": raw}
        await self.served(scope, wire.receive, wire.send)
        return wire


def front_of(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Front:
    path = folder / "classes.yaml"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setenv("SLOS_SERVE_CLASSES", str(path))
    monkeypatch.setenv(SEAL_KEY_ENV, SECRET)
    engine = Engine()
    return Front(SLOMiddleware(engine), engine)


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Front:
    return front_of(TRUST, tmp_path, monkeypatch)


FORGED = b'{"vllm_xargs": {"slo_class": "gold", "slo_tenant": "team-a"}}'
TO_GOLD = b'{"vllm_xargs": {"slo_class": "gold"}}'
GOLD = ("x-slo-class", "gold")
A, B = ("x-tenant", "team-a"), ("authorization", "Bearer key-of-b")
ATTACKS: list[tuple[str, list[tuple[str, str]], bytes, int, str]] = [
    ("a class that is not the tenant's, in a header", [B, GOLD], b"{}", 403, "slo_class"),
    ("the same in the body", [B], TO_GOLD, 403, "slo_class"),
    ("the same by a tier in the body", [B], b'{"service_tier": "priority"}', 403, "slo_class"),
    ("the same by llm-d's header", [B, ("x-llm-d-inference-objective", "critical")], b"{}", 403, "slo_class"),
    ("a class behind an escape", [B], TO_GOLD.replace(b"slo_", b"\\u0073lo_"), 403, "slo_class"),
    ("all of it behind an escape", [B], TO_GOLD.replace(b"vllm", b"\\u0076llm"), 403, "slo_class"),
    ("a key given twice", [B], b'{"vllm_xargs": {}, ' + TO_GOLD[1:], 403, "slo_class"),
    ("numbers, where only classes are allowed", [B, ("x-slo-ttft-ms", "1")], b"{}", 403, "slo_ttft_ms"),
    ("a task of its own", [B, ("x-slo-task-ms", "1"), ("x-session-id", "s")], b"{}", 403, "slo_ttft_ms"),
    ("a task without a session", [A, ("x-slo-task-ms", "60000")], b"{}", 400, "session_id"),
    ("the same beside a class in a header", [A, GOLD, ("x-slo-task-ms", "60000")], b"{}", 400, "session_id"),
    ("calls of no task", [A, GOLD, ("x-slo-task-calls", "3")], b"{}", 400, "slo_task_calls"),
    (
        "a task that is over before it begins",
        [A, ("x-slo-task-ms", "0"), ("x-session-id", "s")],
        b"{}",
        400,
        "x-slo-task-ms",
    ),
    ("a tenant that the body claims", [B], FORGED, 400, "vllm_xargs.slo_tenant"),
    ("a router's ticket", [B], b'{"vllm_xargs": {"slo_ticket": 5}}', 400, "vllm_xargs.slo_ticket"),
    ("a promise that nobody told", [B], b'{"vllm_xargs": {"slo_told": 0}}', 400, "vllm_xargs.slo_told"),
    ("an unknown tenant", [("x-tenant", "team-z"), GOLD], b"{}", 403, "slo_class"),
    ("no tenant", [GOLD], b"{}", 403, "slo_class"),
    ("an unknown key", [("authorization", "Bearer nope"), GOLD], b"{}", 403, "slo_class"),
    ("two tenants", [("x-tenant", "team-b"), A, GOLD], b"{}", 400, "x-tenant"),
    ("a header in a header", [("x-tenant", "team-a\r\nx-slo-class: gold")], b"{}", 400, "x-tenant"),
    ("a tenant that is no name", [("x-tenant", "../" * 100)], b"{}", 400, "x-tenant"),
    ("a long session", [A, ("x-session-id", "s" * 257), ("x-slo-class", "chat")], b"{}", 400, "x-session-id"),
    (
        "numbers in the body beside a class that the proxy set",
        [A, ("x-slo-class", "chat")],
        b'{"vllm_xargs": {"slo_ttft_ms": 1}}',
        403,
        "slo_ttft_ms",
    ),
]


@pytest.mark.parametrize(
    ("headers", "body", "status", "param"), [row[1:] for row in ATTACKS], ids=[row[0] for row in ATTACKS]
)
async def test_an_attack_is_refused_by_name(
    front: Front, headers: list[tuple[str, str]], body: bytes, status: int, param: str
) -> None:
    wire = await front.ask(headers, body)
    assert (wire.status, wire.error["param"], front.engine.calls) == (status, param, 0)
    wire = await front.ask({**AS_A, "x-slo-class": "gold"})
    assert (wire.status, wire.headers["x-slo-class"]) == (200, "gold"), "others are unharmed"


async def test_a_header_counts_over_the_body(front: Front) -> None:
    wire = await front.ask({**AS_A, "x-slo-class": "chat"}, b'{"vllm_xargs": {"slo_class": "gold"}}')
    assert wire.headers["x-slo-class"] == "chat"
    assert front.engine.document["vllm_xargs"]["slo_class"] == "chat"


async def test_the_engine_is_told_who_asks_in_a_form_that_only_the_server_makes(front: Front) -> None:
    for headers, tenant in ((AS_A, "team-a"), (BY_KEY, "team-b"), ({"x-tenant": "team-z"}, "team-z")):
        await front.ask({**headers, "x-slo-class": "chat"})
        sealed = front.engine.document["vllm_xargs"]["slo_tenant"]
        assert Seal(SECRET.encode()).opened(sealed) == tenant
        assert Seal(b"x" * 32).opened(sealed) is None
        assert Seal(SECRET.encode()).opened(sealed.replace("team", "teem")) is None


async def test_a_quota_is_the_tenants_own(front: Front) -> None:
    statuses = [(await front.ask({**BY_KEY, "x-slo-class": "chat"})) for _ in range(3)]
    assert [wire.status for wire in statuses] == [200, 200, 429]
    assert 1 <= int(statuses[-1].headers["retry-after"]) <= 30
    assert (await front.ask({**AS_A, "x-slo-class": "chat"})).status == 200
    assert (await front.ask({**BY_KEY, "x-slo-class": "batch"})).status == 200, "best effort is free"


async def test_invented_tenants_share_one_budget(front: Front) -> None:
    wires = [await front.ask({"x-tenant": f"t{index}", "x-slo-class": "chat"}) for index in range(3)]
    assert [wire.status for wire in wires] == [200, 429, 429]


async def test_a_request_that_the_server_refuses_costs_no_budget(front: Front) -> None:
    front.engine.status = 401
    for _ in range(5):
        assert (await front.ask({**BY_KEY, "x-slo-class": "chat"})).status == 401
    front.engine.status = 200
    assert (await front.ask({**BY_KEY, "x-slo-class": "chat"})).status == 200


async def test_what_is_denied_may_be_served_without_a_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = front_of(TRUST.replace("trust:", "trust:\n  when_denied: best_effort"), tmp_path, monkeypatch)
    body = b'{"vllm_xargs": {"slo_class": "gold", "slo_ttft_ms": 1, "mine": 2}}'
    wire = await front.ask(BY_KEY, body)
    assert (wire.status, wire.headers["x-slo-class"], wire.headers["x-slo-denied"]) == (200, "none", "numbers")
    assert front.engine.document["vllm_xargs"] == {"slo_class": "none", "mine": 2}


async def test_a_large_body_is_neither_read_to_its_end_nor_looked_into(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(middleware, "body_fields", lambda data: looked.append(len(data)))
    body = b'{"prompt": "' + b"[]," * (32 * 1024 * 1024 // 3) + b'"}'
    wire = await front.ask({**AS_A, "x-slo-class": "gold"}, body)
    assert (wire.status, front.engine.calls, looked) == (413, 0, [])
    assert wire.reads <= 4 * 1024 * 1024 // 65536 + 1


def test_ten_thousand_sessions_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text(TRUST, encoding="utf-8")
    config = PluginConfig(classes_path=tmp_path / "c.yaml")
    gate = Gate(config, lambda: 0.0, Seal(b"x" * 32))
    for index in range(10_000):
        raw = [(b"x-session-id", b"s%d" % index), (b"x-slo-class", b"chat"), (b"x-tenant", b"team-a")]
        assert gate.granted(raw, None, config.classes).added["session_id"] == f"s{index}"
    assert len(gate.quotas) == 0, "team-a has no limit, so nothing is counted"
    book = TaskBook(lambda _tokens: 0.01, most_of_tenant=1000)
    for index in range(10_000):
        book.begin(TaskKey("team-a", f"s{index}"), CallAsked(TaskPromise(1000.0), 0, 0.001 * index, 10, 10))
    assert len(book) == 1000
    sessions = Sessions(most=1000)
    for index in range(10_000):
        sessions.sent(f"s{index}", "a", 100)
    assert len(sessions) == 1000


def test_ten_thousand_tenants_take_one_budget() -> None:
    trust = parse_class_file(TRUST, "classes.yaml").trust
    quotas = Quotas(trust)
    for index in range(10_000):
        try:
            quotas.take(0.0, f"t{index}")
        except DeniedError:
            continue
    assert len(quotas) == 1


async def test_an_unmapped_tier_is_said_once_and_at_most_so_often(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="slos_serve.vllm_plugin.gate"):
        for _ in range(2):
            await front.ask({}, b'{"service_tier": "flex", "priority": 0}')
        assert [record.getMessage() for record in caplog.records] == [
            "slos-serve: service_tier 'flex' stands for no class (section 'map' of the class file); said once."
        ]
        for index in range(100):
            await front.ask({"x-llm-d-inference-objective": f"o{index}"})
    assert len(caplog.records) == MOST_WARNINGS


async def test_tiers_of_others_stand_for_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TRUST.split("trust:", maxsplit=1)[0] + (
        "map:\n  service_tier: {priority: gold, flex: batch}\n  priority: {0: chat, -5: gold}\n"
        "  x-gateway-inference-fairness-id: {team-1: chat}\n"
    )
    front = front_of(text, tmp_path, monkeypatch)
    cases: list[tuple[dict[str, str], bytes, str]] = [
        ({}, b'{"service_tier": "priority"}', "gold"),
        ({}, b'{"service_tier": "flex"}', "batch"),
        ({}, b'{"service_tier": "auto", "priority": -5}', "gold"),
        ({"X-Gateway-Inference-Fairness-Id": "team-1"}, b'{"service_tier": "priority"}', "chat"),
        ({"x-slo-class": "gold"}, b'{"priority": 0}', "gold"),
        ({}, b'{"priority": 0, "vllm_xargs": {"slo_class": "gold"}}', "gold"),
        ({}, b'{"service_tier": ["priority"], "priority": true}', "none"),
        ({}, b'{"prompt": "\\"service_tier\\": \\"priority\\""}', "none"),
    ]
    for headers, body, expected in cases:
        wire = await front.ask(headers, body)
        assert (wire.status, wire.headers["x-slo-class"]) == (200, expected), body
        applied = front.engine.document.get("vllm_xargs", {}).get("slo_class", "none")
        assert applied == expected, "the scheduler sees the same"


def test_without_the_section_everybody_may_ask_for_everything() -> None:
    trust = parse_class_file("classes: {chat: {tpot_ms: 5}}", "c").trust
    assert not trust.given
    trust.check(None, "chat", has_numbers=True)
    Quotas(trust).take(0.0, None)


async def test_a_tenant_without_the_default_class_is_served_without_a_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = front_of("default_class: gold\n" + TRUST, tmp_path, monkeypatch)
    wire = await front.ask(BY_KEY)
    assert (wire.status, wire.headers["x-slo-class"]) == (200, "none")
    assert (await front.ask(AS_A)).headers["x-slo-class"] == "gold"
