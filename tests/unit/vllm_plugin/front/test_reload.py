"""A class file that changes while the server runs: front end and engine take it at the same request, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet
from slos_serve.vllm_plugin.class_versions import VERSION_KEY, ClassVersions, digest_of
from slos_serve.vllm_plugin.front.client import attach
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.explain import explain
from slos_serve.vllm_plugin.slo_args import SloArgs
from tests.unit.routing.fleet import loaded
from tests.unit.vllm_plugin.front.builders import CLASSES, Client, Server, desk

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
    client, params = Client(), SimpleNamespace(extra_args=extra_args)
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
    engine = ClassVersions(front.config.classes, os.getpid())
    before = handed_over(front, {"slo_class": "chat"})
    changed(tmp_path, front, NEW)
    after = handed_over(front, {"slo_class": "chat"})
    changed(tmp_path, front, NEW.replace("700", "600"), at_s=20.0)
    latest = handed_over(front, None)
    found = [engine.classes_of(args).classes["chat"].slo.ttft_ms for args in (before, after, latest, before)]
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
    engine = ClassVersions(ClassSet(), os.getpid())
    if given is not None:  # past the front end
        with pytest.raises(InvalidFieldError, match=VERSION_KEY):
            engine.classes_of({VERSION_KEY: given})
