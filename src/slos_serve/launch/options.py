"""What the arguments of vLLM's server say about its HTTP side, read without importing vLLM.

vLLM's own parser takes seconds to import, and everything here has to be known before the server starts: where it will
listen, whether it speaks TLS, whether it has an HTTP side at all, and which words are secret. ``--config FILE`` is read
as vLLM reads it: its entries stand before the command line, which overrides them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from slos_serve.core.errors import InvalidFieldError

API_KEY = "--api-key"
CONFIG = "--config"


def option_values(arguments: Sequence[str], name: str) -> list[str] | None:
    """Values of ``--name A B`` or ``--name=A``, the last occurrence counting; ``None`` when absent.

    Underscores and dashes are the same, as in vLLM. A flag without a value gives an empty list.
    """
    found: list[str] | None = None
    collecting = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if _is_option(argument):
            collecting = _plain(option) == name
            if collecting:
                found = [value] if equals else []
        elif collecting and found is not None:
            found.append(argument)
    return found


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """First value of the last ``--name VALUE`` or ``--name=VALUE``; ``None`` when absent or without a value."""
    found = option_values(arguments, name)
    return found[0] if found else None


def without_option(arguments: Sequence[str], name: str, most_values: int | None = 1) -> list[str]:
    """The arguments without ``--name VALUE`` and ``--name=VALUE``; ``most_values=None`` drops every value after it."""
    kept: list[str] = []
    left = 0
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if _is_option(argument):
            dropped = _plain(option) == name
            left = 0 if equals or not dropped else (len(arguments) if most_values is None else most_values)
            if dropped:
                continue
        elif left > 0:
            left -= 1
            continue
        kept.append(argument)
    return kept


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--config FILE`` replaced by the file's entries, in vLLM's order: file first.

    Raises:
        InvalidFieldError: the file cannot be read or holds no mapping.
    """
    path = option_value(arguments, CONFIG)
    if path is None:
        return list(arguments)
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise InvalidFieldError(CONFIG, path, f"a readable YAML file ({type(fault).__name__})") from fault
    if not isinstance(entries, dict):
        raise InvalidFieldError(CONFIG, path, "a YAML file that holds a mapping of vLLM's options")
    words: list[str] = []
    for key, value in entries.items():
        words += _words(str(key), value)
    return [*words, *without_option(arguments, CONFIG)]


def with_config_apart(arguments: Sequence[str]) -> list[str]:
    """``--config=FILE`` as two words: vLLM's parser reads the file only when it is given like that."""
    words: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        words += [name, value] if equals and name == CONFIG else [argument]
    return words


def option_words(name: str, value: object) -> list[str]:
    """``max_model_len``, 64 -> ``--max-model-len 64``; true is a flag, false is left out."""
    return _words(name.replace("_", "-"), value)


def _words(key: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    return [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _is_option(argument: str) -> bool:
    """Whether a word names an option; ``-1`` is a value."""
    return argument.startswith("-") and not argument[1:2].isdigit() and argument != "-"


def _plain(option: str) -> str:
    return "--" + option[2:].replace("_", "-") if option.startswith("--") else option
