"""A class file that changes while the server runs: front end and engine take it at the same request, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet
from slos_serve.vllm_plugin.class_versions import VERSION_KEY, ClassVersion, ClassVersions, digest_of
from slos_serve.vllm_plugin.front.client import attach
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.explain import explain
from slos_serve.vllm_plugin.middleware import SLOMiddleware
from slos_serve.vllm_plugin.seal import SEAL_KEY_ENV
from slos_serve.vllm_plugin.slo_args import SloArgs
from tests.unit.routing.fleet import loaded
from tests.unit.vllm_plugin.front.builders import CLASSES, Client, Server, desk
from tests.unit.vllm_plugin.test_middleware import Engine, Wire

NEW = CLASSES.replace("chat: {ttft_ms: 1000", "chat: {ttft_ms: 700").replace("batch", "nightly")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies go to a folder of this test."""
    folder = tmp_path / "f"
    folder.mkdir(mode=0o700)
    named = "slos_serve.vllm_plugin.class_versions.socket_path"
    monkeypatch.setattr(named, lambda kind, process: folder / f"{process}.{kind}")


def changed(tmp_path: Path, front: FrontDesk, text: str, at_s: float = 10.0) -> None:
    """The file is written anew, and looked at until it has settled."""
    file = tmp_path / "classes.yaml"
    file.write_text(text, encoding="utf-8")
    os.utime(file, (at_s, at_s))
    for step in range(3):
        front.look_at_file(100.0 * at_s + 2.0 * step)


def count(front: FrontDesk, result: str) -> float | None:
    labels = {"model_name": "m", "engine": "0", "result": result}
    return front.metrics.registry.get_sample_value("slos_serve:class_file_reloads_total", labels)


def handed_over(front: FrontDesk, extra_args: dict[str, object] | None) -> dict[str, object]:
    """Extra arguments as the engine gets them, of a request that nobody judges."""
    client, params = Client(front, promises=False), SimpleNamespace(extra_args=extra_args)
    attach(client, front)
    client.generate({}, params, "r")
    return client.extra_args["r"]


async def test_new_numbers_hold_from_the_next_request_on(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    server = Server(front)
    assert (await server.ask("chat"))[1]["x-slo-target-ttft-ms"] == "1000"
    changed(tmp_path, front, NEW)
    assert (await server.ask("chat"))[1]["x-slo-target-ttft-ms"] == "700"
    assert explain(front, SloArgs(slo_class="chat"), 100).target_ttft_ms == 700.0
    assert (count(front, "taken"), count(front, "kept_old")) == (1.0, 0.0)


async def test_a_file_that_is_gone_keeps_the_classes_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    front = desk(tmp_path, loaded(0))
    (tmp_path / "classes.yaml").unlink()
    with caplog.at_level("ERROR", logger="vllm.slos_serve"):
        for step in range(6):
            front.look_at_file(1000.0 + 2.0 * step)
    assert [record.getMessage().endswith("classes.yaml is gone.") for record in caplog.records] == [True]
    assert count(front, "kept_old") == 1.0
    assert (await Server(front).ask("chat"))[1]["x-slo-target-ttft-ms"] == "1000"
    changed(tmp_path, front, NEW, at_s=20.0)  # it is back
    assert count(front, "taken") == 1.0


def test_a_file_that_is_asked_for_is_taken_at_the_next_look(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    front.look_at_file(1000.0)
    (tmp_path / "classes.yaml").write_text(NEW, encoding="utf-8")
    front.look_at_file(1000.1)
    assert front.version.digest == ""
    front.read_file_again()
    front.look_at_file(1000.2)
    assert front.version.digest == digest_of(NEW)
    for second in range(1, 4):
        front.look_at_file(1000.0 + second)
    assert count(front, "taken") == 1.0, "once"
    (tmp_path / "classes.yaml").unlink()
    front.read_file_again()
    front.look_at_file(1005.0)
    assert front.version.digest == digest_of(NEW) and count(front, "kept_old") == 1.0


def test_the_engine_judges_by_the_version_that_the_front_end_used(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    engine = ClassVersions(ClassVersion(front.config.classes), os.getpid())
    before = handed_over(front, {"slo_class": "chat"})
    changed(tmp_path, front, NEW)
    after = handed_over(front, {"slo_class": "chat"})
    changed(tmp_path, front, NEW.replace("700", "600"), at_s=20.0)
    latest = handed_over(front, None)
    found = [engine.version_of(args).classes.classes["chat"].slo.ttft_ms for args in (before, after, latest, before)]
    assert found == [1000, 700, 600, 1000]


def test_a_request_that_had_begun_keeps_the_version_of_its_head(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    judged = front.begin(front.version.classes.classes["chat"], front.version)
    changed(tmp_path, front, NEW)
    params = SimpleNamespace(extra_args={"slo_class": "chat"}, max_tokens=100, n=1)
    front.entered(judged, {"prompt_token_ids": [1] * 100}, params, "r")
    assert judged.ttft_target_s == pytest.approx(1.0)


def test_a_broken_file_changes_nothing_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    front = desk(tmp_path, loaded(0))
    changed(tmp_path, front, CLASSES.replace("tpot_ms: 100, when_full: reject}", "tpotms: 100}"))
    assert front.version.digest == "" and front.version.classes is front.config.classes
    assert (count(front, "taken"), count(front, "kept_old")) == (0.0, 1.0)
    assert f"{tmp_path / 'classes.yaml'}:4" in caplog.text and "tpotms" in caplog.text
    front.look_at_file(2000.0)
    assert count(front, "kept_old") == 1.0  # said once
    changed(tmp_path, front, NEW, at_s=30.0)
    assert front.version.digest == digest_of(NEW)


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    front = desk(tmp_path, loaded(0))
    file = tmp_path / "classes.yaml"
    for second, part in enumerate((NEW[:40], NEW[:80], NEW), start=1):
        file.write_text(part, encoding="utf-8")
        os.utime(file, (second, second))
        front.look_at_file(1000.0 + 2.0 * second)
        assert front.version.digest == ""
    file.unlink()
    front.look_at_file(1010.0)
    file.write_text(NEW, encoding="utf-8")
    front.look_at_file(1012.0)
    front.look_at_file(1014.0)
    assert front.version.digest == digest_of(NEW) and count(front, "kept_old") == 0.0


@pytest.mark.parametrize("given", ["0" * 16, "../../../etc/passwd", 7, None, "", "g" * 16])
def test_what_a_client_says_of_versions_counts_for_nothing(tmp_path: Path, given: object) -> None:
    front = desk(tmp_path, loaded(0))
    assert handed_over(front, {VERSION_KEY: given, "slo_class": "chat"}) == {"slo_class": "chat"}
    changed(tmp_path, front, NEW)
    found = handed_over(front, {VERSION_KEY: given})
    assert found == {VERSION_KEY: digest_of(NEW)}
    engine = ClassVersions(ClassVersion(ClassSet()), os.getpid())
    if given is not None:  # past the front end
        with pytest.raises(InvalidFieldError, match=VERSION_KEY):
            engine.version_of({VERSION_KEY: given})


# Who may ask, and tiers -----------------------------------------------------------------------------------------------

SECTIONS = """
trust:
  tenant_header: x-tenant
  tenants:
    team-a: {classes: [chat, strict], promises_per_minute: %s}
    team-b: {classes: %s}
map:
  service_tier: {priority: %s}
"""


class Asking:
    """The middleware before a front desk; the engine behind it takes everything."""

    def __init__(self, front: FrontDesk, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLOS_SERVE_CLASSES", str(front.config.classes_path))
        monkeypatch.setenv(SEAL_KEY_ENV, "k" * 32)
        self.engine = Engine()
        self._served = SLOMiddleware(self.engine)
        self._served._front = front

    async def status(self, tenant: str, slo_class: str | None, body: bytes = b'{"prompt": "x"}') -> int:
        self.engine.body = b""
        wire = Wire([body])
        headers = {"x-tenant": tenant} | ({"x-slo-class": slo_class} if slo_class else {})
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": raw}
        await self._served(scope, wire.receive, wire.send)
        return wire.status


async def test_who_may_ask_and_tiers_change_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = desk(tmp_path, loaded(0))  # its file has neither section
    asking = Asking(front, monkeypatch)
    assert await asking.status("team-b", "strict") == 200
    changed(tmp_path, front, CLASSES + SECTIONS % (2, "[chat]", "chat"))
    assert [await asking.status("team-b", name) for name in ("strict", "chat")] == [403, 200]
    assert await asking.status("nobody", "chat") == 403, "others may have no promise"
    changed(tmp_path, front, CLASSES + SECTIONS % (2, "[strict]", "strict"), at_s=20.0)
    assert [await asking.status("team-b", name) for name in ("strict", "chat")] == [200, 403]
    assert await asking.status("team-b", None, b'{"prompt": "x", "service_tier": "priority"}') == 200
    assert asking.engine.document["vllm_xargs"]["slo_class"] == "strict"
    changed(tmp_path, front, CLASSES, at_s=30.0)
    assert await asking.status("nobody", "chat") == 200


async def test_what_was_used_of_a_budget_counts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = desk(tmp_path, loaded(0))
    asking = Asking(front, monkeypatch)
    changed(tmp_path, front, CLASSES + SECTIONS % (2, "[chat]", "chat"))
    assert [await asking.status("team-a", "chat") for _ in range(3)] == [200, 200, 429]
    changed(tmp_path, front, CLASSES + SECTIONS % (3, "[chat]", "chat"), at_s=20.0)
    assert await asking.status("team-a", "chat") == 429


@pytest.mark.parametrize(
    ("broken", "named"), [("[nightly]", "nightly"), ("[chat], promises_per_minut: 1", "promises_per_minut")]
)
async def test_a_broken_section_keeps_the_old_one_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str, named: str
) -> None:
    front = desk(tmp_path, loaded(0))
    asking = Asking(front, monkeypatch)
    changed(tmp_path, front, CLASSES + SECTIONS % (2, "[chat]", "chat"))
    changed(tmp_path, front, CLASSES + SECTIONS % (2, broken, "chat"), at_s=20.0)
    assert [await asking.status("team-b", name) for name in ("strict", "chat")] == [403, 200]
    assert (count(front, "taken"), count(front, "kept_old")) == (1.0, 1.0)
    assert "the classes stay as they were" in caplog.text and named in caplog.text


def test_tenants_without_a_seal_keep_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(SEAL_KEY_ENV, "short")
    front = desk(tmp_path, loaded(0))
    changed(tmp_path, front, CLASSES + SECTIONS % (2, "[chat]", "chat"))
    assert front.version.digest == "" and count(front, "kept_old") == 1.0
    assert SEAL_KEY_ENV in caplog.text


def test_the_engine_knows_who_may_ask_of_the_version_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SEAL_KEY_ENV, "k" * 32)
    front = desk(tmp_path, loaded(0))
    engine = ClassVersions(ClassVersion(front.config.classes), os.getpid(), custom_numbers=False)
    before = handed_over(front, {"slo_class": "chat"})
    changed(tmp_path, front, CLASSES + SECTIONS % (2, "[chat]", "strict"))
    after = handed_over(front, {"slo_class": "chat"})
    assert not engine.version_of(before).trust.given
    found = engine.version_of(after)
    assert found.trust.rule("team-b").classes == frozenset(["chat"])
    assert not found.trust.rule("team-a").custom_numbers
    assert found.tiers.class_of("service_tier", "priority") == "strict"
