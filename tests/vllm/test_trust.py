"""What the scheduler makes of requests that came around the middleware: it judges who may ask for what by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from slos_serve.vllm_plugin.class_versions import VERSION_KEY, ClassVersion, ClassVersions, digest_of, keep_copy
from slos_serve.vllm_plugin.seal import SEAL_KEY_ENV, Seal, seal_of
from tests.vllm.dry_load import Start, events

SECRET = "k" * 32
TRUST = """
classes:
  gold: {ttft_ms: 1000, tpot_ms: 100}
  chat: {ttft_ms: 1000, tpot_ms: 100}
trust:
  tenant_header: x-tenant
  tenants:
    team-a: {classes: [gold, chat], promises_per_minute: 2}
    team-b: {classes: [gold], tokens_per_minute: 100, custom_numbers: true}
  others: {classes: [chat]}
"""


@pytest.fixture
def trusting(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    (tmp_path / "classes.yaml").write_text(TRUST, encoding="utf-8")
    monkeypatch.setenv(SEAL_KEY_ENV, SECRET)
    return start


def sealed(tenant: str, **fields: object) -> dict[str, object]:
    return {"slo_tenant": Seal(SECRET.encode()).sealed(tenant), **fields}


def test_only_a_sealed_tenant_gets_its_promise(trusting: Start, tmp_path: Path) -> None:
    engine = trusting()
    asked: dict[str, dict[str, object]] = {
        "sealed": sealed("team-a", slo_class="gold"),
        "unsealed": {"slo_class": "gold"},
        "forged": {"slo_class": "gold", "slo_tenant": "team-a " + "0" * 43},
        "anothers": {"slo_class": "gold", "slo_tenant": Seal(b"x" * 32).sealed("team-a")},
        "numbers": sealed("team-a", slo_class="gold", slo_ttft_ms=1),
        "others": {"slo_class": "chat"},
    }
    for name, fields in asked.items():
        engine.add(name, [5, 6, 7], 4, fields)
    engine.run()
    given = {event["request_id"]: event["verdict"] for event in events(tmp_path, "request")}
    expected = dict.fromkeys(asked, "no-slo") | {"sealed": "admitted", "others": "admitted"}
    assert given == expected, "each is served, two with a promise"
    assert all(len(answer) == 4 for answer in engine.answers.values())


def test_a_budget_is_counted_by_the_scheduler_too(trusting: Start, tmp_path: Path) -> None:
    engine = trusting()
    for number in range(4):
        engine.add(f"r{number}", [5, 6, 7], 4, sealed("team-a", slo_class="chat"))
        engine.run()
    engine.now_s += 60.0
    engine.add("later", [5, 6, 7], 4, sealed("team-a", slo_class="chat"))
    engine.run()
    given = [event["verdict"] for event in events(tmp_path, "request")]
    assert given == ["admitted", "admitted", "no-slo", "no-slo", "admitted"]


def test_tokens_are_counted_when_they_come(trusting: Start, tmp_path: Path) -> None:
    engine = trusting()
    for number in range(3):
        engine.add(f"r{number}", [5] * 40, 20, sealed("team-b", slo_class="gold"))
        engine.run()
    given = [event["verdict"] for event in events(tmp_path, "request")]
    assert given == ["admitted", "admitted", "no-slo"], "60 tokens each of 100 a minute: the second one may overdraw"


def test_the_scheduler_goes_by_the_sections_that_the_front_end_used(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SEAL_KEY_ENV, SECRET)
    folder = tmp_path / "versions"
    folder.mkdir()
    named = "slos_serve.vllm_plugin.class_versions.socket_path"
    monkeypatch.setattr(named, lambda kind, process: folder / f"{process}.{kind}")
    (tmp_path / "classes.yaml").write_text(TRUST.partition("trust:")[0], encoding="utf-8")
    engine = start()  # its first file knows no tenants
    desk = engine.scheduler._slo_desk
    desk._versions = ClassVersions(ClassVersion(desk._settings.classes), 77)
    assert keep_copy(TRUST, 77)
    new = {VERSION_KEY: digest_of(TRUST)}
    asked: dict[str, dict[str, object]] = {
        "before": {"slo_class": "gold"},
        "sealed": sealed("team-a", slo_class="gold", **new),
        "nobody": {"slo_class": "gold", **new},
    }
    for name, fields in asked.items():
        engine.add(name, [5, 6, 7], 4, fields)
    engine.run()
    given = {event["request_id"]: event["verdict"] for event in events(tmp_path, "request")}
    assert given == {"before": "admitted", "sealed": "admitted", "nobody": "no-slo"}


def test_both_processes_of_a_server_have_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SEAL_KEY_ENV, raising=False)
    first, second = seal_of({}), seal_of({})
    assert second.opened(first.sealed("team-a")) == "team-a"
    assert seal_of({}, process=1).opened(first.sealed("team-a")) is None
