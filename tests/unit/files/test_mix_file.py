"""The mix file: what it says, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.mix_file import DEFAULT_SPREAD, MixClass, MixFile, load_mix

GOOD = """
peak_rps: 40
arrivals: gamma:2
day: [1, 2, 4]
mix:
  chat: {share: 60, like: chat}
  report: {share: 10, prompt_tokens: 6000, output_tokens: 400}
"""


def read(tmp_path: Path, text: str) -> MixFile:
    file = tmp_path / "mix.yaml"
    file.write_text(text, encoding="utf-8")
    return load_mix(file)


def test_says_shares_lengths_and_the_day(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.classes == (
        MixClass("chat", 60.0, "chat"),
        MixClass("report", 10.0, None, 6000.0, 400.0, DEFAULT_SPREAD),
    )
    assert (found.peak_rps, found.arrivals, found.day) == (40.0, "gamma:2", (1.0, 2.0, 4.0))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "mix.yaml:1"),
        ("peak_rps: 4", "mix.yaml:1: mix"),
        ("mix: {}", "at least one class"),
        ("mix:\n  chat: {like: chat}", "mix.yaml:2: mix.chat.share"),
        ("mix:\n  chat: {share: 0, like: chat}", "mix.chat.share"),
        ("mix:\n  chat: {share: 1, like: chat, spread: 1}", "either 'like'"),
        ("mix:\n  chat: {share: 1, prompt_tokens: 5}", "mix.yaml:2: mix.chat"),
        ("mix:\n  chat: {share: 1, like: chat}\nday: [0, 0]", "mix.yaml:3: day"),
        ("mix:\n  chat: {share: 1, like: chat}\nday: 3", "a list"),
        ("mix:\n  chat: {share: 1, like: chat}\npeak: 3", "peak_rps"),
        ("mix: [", "YAML"),
    ],
)
def test_names_the_line_of_what_it_cannot_use(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(InvalidFieldError, match=named.replace("[", r"\[")):
        read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidFieldError, match=r"nowhere\.yaml"):
        load_mix(tmp_path / "nowhere.yaml")
