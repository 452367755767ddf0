"""The examples of docs/promises.md, run against the middleware: each answers with the headers that stand below it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from slos_serve.files.class_file import parse_class_file, parse_classes
from slos_serve.files.trust_section import RULE_KEYS, TRUST_KEYS
from tests.unit.vllm_plugin.test_middleware import Engine, Wire, post

PAGE = (Path(__file__).parents[3] / "docs" / "promises.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


CLASSES = parse_classes(blocks("yaml")[0], "docs/promises.md")


@pytest.mark.parametrize("text", blocks("yaml"))
def test_class_files_are_right(text: str) -> None:
    assert len(parse_class_file(text, "docs/promises.md").classes) >= 1


def expected(text: str) -> dict[str, str]:
    found = dict(re.findall(r"^# (x-slo-[a-z-]+): (.+)$", text, re.MULTILINE))
    assert found, "the example says what comes back"
    return found


def assert_answered(wire: Wire, engine: Engine, text: str) -> None:
    assert (wire.status, engine.calls) == (200, 1)
    assert expected(text).items() <= wire.headers.items()


@pytest.mark.parametrize("text", blocks("bash"))
async def test_curl(text: str) -> None:
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    assert words[0] == "curl"
    given = [words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H"]
    body = json.loads(words[words.index("-d") + 1])
    path = words[1].removeprefix("http://127.0.0.1:8000")
    wire, engine = await post(body, dict(given), classes=CLASSES, path=path)
    assert_answered(wire, engine, text)


class Client:
    """Stands for ``OpenAI()``: keeps what it is asked to send."""

    def __init__(self) -> None:
        self.completions = self
        self.chat = self
        self.sent: dict[str, Any] = {}

    def create(self, **fields: Any) -> None:
        self.sent = fields


@pytest.mark.parametrize("text", blocks("python"))
async def test_the_openai_client(text: str) -> None:
    client = Client()
    exec(text, {"client": client})
    headers = client.sent.pop("extra_headers", {})
    body = {**client.sent, **client.sent.pop("extra_body", {})}
    wire, engine = await post(body, headers, classes=CLASSES)
    assert_answered(wire, engine, text)


def test_every_key_of_trust_is_explained() -> None:
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", PAGE, re.MULTILINE))
    assert listed == {*TRUST_KEYS, *RULE_KEYS} - {"tenants"}


def test_every_kind_has_an_example_of_each_sort() -> None:
    assert len(blocks("bash")) == len(blocks("python")) >= 6
