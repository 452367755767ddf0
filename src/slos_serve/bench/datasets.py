"""Prompts from files that others benchmark with: ShareGPT, the custom JSONL of ``vllm bench serve``, guidellm's files.

- **ShareGPT**: a JSON list; each entry's ``conversations`` begin with a question and its answer. Entries with fewer
  than two turns are left out. Without a tokenizer the answer's length is its words times :data:`TOKENS_A_WORD`.
- **JSON lines, a JSON list of objects, or CSV**: the prompt in ``prompt``, ``text`` or ``input``; optional the answer's
  length in ``output_tokens`` or ``output_tokens_count``, and a class of the class file in ``slo_class``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slos_serve.bench.requests import BenchRequest
from slos_serve.bench.trace_load import default_class
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet

PROMPT_KEYS = ("prompt", "text", "input")
LENGTH_KEYS = ("output_tokens", "output_tokens_count")
TOKENS_A_WORD = 1.3
# Answer length of rows that give none, as `vllm bench serve` has it for its custom dataset.
DEFAULT_OUTPUT_TOKENS = 256
MAX_OUTPUT_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One request of a dataset.

    Attributes:
        prompt: text.
        output_tokens: cap on the answer.
        slo_class: its class; ``None`` for the default class.
    """

    prompt: str
    output_tokens: int = DEFAULT_OUTPUT_TOKENS
    slo_class: str | None = None


def read_dataset(path: Path) -> list[DatasetRow]:
    """The rows of a dataset file.

    Raises:
        InvalidFieldError: it cannot be read, or holds no prompt; ``where`` is ``file:row``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise InvalidFieldError("dataset", str(path), f"a readable UTF-8 file ({fault})") from fault
    rows = []
    for number, entry in enumerate(_entries(path, text), start=1):
        row = _row(entry, f"{path}:{number}")
        if row is not None:
            rows.append(row)
    if not rows:
        raise InvalidFieldError("dataset", str(path), "at least one row with a prompt")
    return rows


def requests_from_dataset(
    rows: Sequence[DatasetRow],
    arrivals_s: NDArray[np.float64],
    classes: ClassSet,
    rng: np.random.Generator,
    *,
    ignore_eos: bool = False,
) -> list[BenchRequest]:
    """One request for each arrival: the rows in random order, again from the start when they run out."""
    fallback = default_class(classes)
    order = rng.permutation(len(rows))
    picked = [rows[int(order[index % len(rows)])] for index in range(len(arrivals_s))]
    return [
        BenchRequest(
            request_id=f"dataset-{index:06d}",
            arrival_s=float(arrival_s),
            prompt=row.prompt,
            max_tokens=row.output_tokens,
            slo_class=row.slo_class or fallback,
            ignore_eos=ignore_eos,
        )
        for index, (arrival_s, row) in enumerate(zip(arrivals_s, picked, strict=True))
    ]


def _entries(path: Path, text: str) -> Sequence[object]:
    if path.suffix.lower() == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    try:
        if text.lstrip().startswith("["):
            found = json.loads(text)
            return found if isinstance(found, list) else [found]
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as fault:
        raise InvalidFieldError("dataset", str(path), f"a JSON list, JSON lines or CSV ({fault})") from fault


def _row(entry: object, where: str) -> DatasetRow | None:
    if not isinstance(entry, Mapping):
        raise InvalidFieldError("dataset row", entry, "an object", where)
    if "conversations" in entry:
        return _turns(entry["conversations"], where)
    key = next((name for name in PROMPT_KEYS if entry.get(name)), None)
    if key is None or not isinstance(entry[key], str):
        raise InvalidFieldError("dataset row", sorted(map(str, entry)), f"text in one of {list(PROMPT_KEYS)}", where)
    slo_class = entry.get("slo_class") or None
    if slo_class is not None and not isinstance(slo_class, str):
        raise InvalidFieldError("slo_class", slo_class, "the name of a class", where)
    return DatasetRow(entry[key], _length(entry, where), slo_class)


def _length(entry: Mapping[str, object], where: str) -> int:
    key = next((name for name in LENGTH_KEYS if entry.get(name) not in (None, "")), None)
    if key is None:
        return DEFAULT_OUTPUT_TOKENS
    value = entry[key]
    try:
        tokens = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else -1
    except ValueError:
        tokens = -1
    if not 1 <= tokens <= MAX_OUTPUT_TOKENS:
        raise InvalidFieldError(key, value, f"a whole number, 1 to {MAX_OUTPUT_TOKENS}", where)
    return tokens


def _turns(turns: object, where: str) -> DatasetRow | None:
    """The first question, as long an answer as its answer; ``None`` for a conversation without one."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InvalidFieldError("conversations", turns, "a list of turns", where)
    if len(turns) < 2:
        return None
    question, answer = turns[0].get("value"), turns[1].get("value")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise InvalidFieldError("conversations", turns[:2], "text in 'value' of each turn", where)
    if not question.strip():
        return None
    return DatasetRow(question, max(round(TOKENS_A_WORD * len(answer.split())), 1))
