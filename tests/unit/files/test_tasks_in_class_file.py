"""What a class file says of whole tasks, and what is refused, by file and line."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.tasks import TaskPromise, task_of
from slos_serve.files.class_file import parse_classes
from slos_serve.files.class_schema import class_file_schema

RIGHT = """
classes:
  chat: {ttft_ms: 500}
  coder: {task_ms: 120000, last_round: chat, weight: 2}
  crawl: {task_ms: 60000, task_pauses: free, task_calls: 5, e2e_ms: 20000}
"""
WRONG = {
    "task_ms: 0": "task_ms",
    "task_ms: soon": "task_ms",
    "task_calls: 3": "task_calls",
    "task_pauses: free": "task_pauses",
    "task_ms: 5000, task_calls: 0": "task_calls",
    "task_ms: 5000, task_calls: 2.5": "task_calls",
    "task_ms: 5000, task_pauses: maybe": "task_pauses",
    "task_ms: 5000, otherwise: [{e2e_ms: 9000}]": "otherwise",
}


def test_classes_with_tasks_are_read() -> None:
    classes = parse_classes(RIGHT, "f.yaml").classes
    assert task_of(classes["chat"]) is None
    assert task_of(classes["coder"]) == TaskPromise(120_000.0)
    assert (classes["coder"].weight, classes["coder"].last_round) == (2.0, "chat")
    assert task_of(classes["crawl"]) == TaskPromise(60_000.0, 5, pauses_count=False)
    assert classes["crawl"].slo.e2e_ms == 20_000.0
    jsonschema.validate(yaml.safe_load(RIGHT), class_file_schema())


@pytest.mark.parametrize(("keys", "field"), WRONG.items())
def test_a_wrong_task_is_refused_with_its_line(keys: str, field: str) -> None:
    text = f"classes:\n  coder: {{{keys}}}\n"
    with pytest.raises(InvalidFieldError) as raised:
        parse_classes(text, "f.yaml")
    assert raised.value.field == f"classes.coder.{field}"
    assert raised.value.where == "f.yaml:2"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), class_file_schema())
