"""Datasets of others: ShareGPT, JSON lines, CSV."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from slos_serve.bench.datasets import DEFAULT_OUTPUT_TOKENS, DatasetRow, read_dataset, requests_from_dataset
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, ClassSet, single_stage


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_sharegpt_gives_first_questions_and_lengths_of_their_answers(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "because " * 10}, {"from": "human"}]
    entries = [{"id": "a", "conversations": turns}, {"id": "b", "conversations": turns[:1]}]
    assert read_dataset(written(tmp_path, "s.json", json.dumps(entries))) == [DatasetRow("Why?", 13)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", '{"prompt": "One", "output_tokens": 7}\n\n{"text": "Two\\nlines"}\n'),
        ("d.json", '[{"prompt": "One", "output_tokens_count": 7}, {"input": "Two\\nlines", "output_tokens": null}]'),
        ("d.csv", 'prompt,output_tokens_count\nOne,7\n"Two\nlines",\n'),
    ],
)
def test_rows_of_prompts(tmp_path: Path, name: str, text: str) -> None:
    rows = read_dataset(written(tmp_path, name, text))
    assert rows == [DatasetRow("One", 7), DatasetRow("Two\nlines", DEFAULT_OUTPUT_TOKENS)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "JSON"),
        ('{"prompt": "a"}\n{"question": "b"}', ":2: dataset row"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens"),
        ('{"prompt": "a", "output_tokens": true}', "output_tokens"),
        ('{"prompt": "a", "slo_class": 3}', "slo_class"),
        ("[3]", "object"),
        ('[{"conversations": 3}]', "conversations"),
        ('[{"conversations": [{"value": 1}, {"value": "x"}]}]', "value"),
        ("[]", "at least one row"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidFieldError, match=said):
        read_dataset(written(tmp_path, "d.jsonl", text))
    with pytest.raises(InvalidFieldError, match="readable"):
        read_dataset(tmp_path / "none.jsonl")


def test_every_arrival_gets_a_row_and_rows_come_again(tmp_path: Path) -> None:
    rows = [DatasetRow(str(n), n + 1, "own" if n else None) for n in range(3)]
    classes = ClassSet({name: single_stage(name, SLO(ttft_ms=1.0)) for name in ("own", "other")}, "other")
    made = requests_from_dataset(rows, np.arange(7, dtype=np.float64), classes, np.random.default_rng(1))
    assert [request.arrival_s for request in made] == list(range(7))
    assert {request.prompt for request in made[:3]} == {"0", "1", "2"}
    assert [request.prompt for request in made[:3]] == [request.prompt for request in made[3:6]]
    assert {(request.prompt, request.slo_class) for request in made} == {("0", "other"), ("1", "own"), ("2", "own")}
    assert all(request.max_tokens == int(request.prompt) + 1 for request in made)
