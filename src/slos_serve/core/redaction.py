"""Takes secrets out of what is written down: command lines, configurations, messages.

A value is a secret by the name it stands under (``--api-key``, ``hf_token``, ``"password"`` inside a JSON value), by
its place in a URL (``redis://user:secret@host``), or because it is one of the secrets that the caller knows (from its
environment). Profiles, events, logs and ``--json`` files get their text through here. Names that only look alike
(``--max-num-batched-tokens``, ``--ssl-keyfile``) keep their values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HIDDEN = "***"
# A known value shorter than this is taken out as an argument of its own, but not out of the middle of a text.
SHORTEST_IN_TEXT = 6
_SECRET_NAMES = ("api-key", "hf-token")
_SECRET = re.compile(
    r"(api-?key|access-?key|secret|password|passwd|passphrase|credential|authorization|bearer|private-?key"
    r"|signing-?key|encryption-?key)|(^|[-.])(token|auth-token|hf-token|access-token|key)$"
)
_URL_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@\"']+@")
_JSON_PAIR = re.compile(
    r"(?P<name>[\"'](?P<key>[^\"']{1,80})[\"']\s*:\s*)(?P<value>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')"
)
_INLINE = re.compile(r"(?P<option>--[A-Za-z][A-Za-z0-9_.-]*)(?P<between>[= ]+)(?P<value>[^\s,\]\"']+)")


def is_secret_name(name: str) -> bool:
    """Whether what stands under ``name`` (an option, a key, a variable) must not be written down.

    Options may be abbreviated as far as vLLM's parser takes them: ``--api-k`` is ``--api-key``.
    """
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower().replace("_", "-")
    is_option = plain.startswith("-")
    plain = plain.lstrip("-")
    if is_option and len(plain) >= 3 and any(known.startswith(plain) for known in _SECRET_NAMES):
        return True
    return _SECRET.search(plain) is not None


def redacted_arguments(arguments: Sequence[str], secrets: Iterable[str] = ()) -> list[str]:
    """Words of a command line with every secret value replaced by ``***``.

    Args:
        arguments: the words; a secret option may have several values.
        secrets: further values to take out wherever they stand.
    """
    known = [secret for secret in secrets if secret]
    shown: list[str] = []
    hiding = False
    for word in arguments:
        option, equals, _ = word.partition("=")
        if word.startswith("-") and not word.startswith("-----"):
            hiding = is_secret_name(option) and not equals
            shown.append(f"{option}={HIDDEN}" if equals and is_secret_name(option) else redacted_text(word, known))
        else:
            shown.append(HIDDEN if hiding or word in known else redacted_text(word, known))
    return shown


def redacted_text(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` without known secrets, user names and passwords of URLs, and values under secret names.

    Finds ``--api-key VALUE`` and ``"api_key": "VALUE"`` inside a sentence or a JSON value too.
    """
    for secret in sorted({secret for secret in secrets if len(secret) >= SHORTEST_IN_TEXT}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _URL_USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _JSON_PAIR.sub(_hide_pair, text)
    return _INLINE.sub(_hide_inline, text)


def redacted(value: Any, secrets: Iterable[str] = ()) -> Any:
    """A JSON-like value with the secrets in it replaced, keys and lists of words included."""
    known = list(secrets)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if is_secret_name(str(key)) and child else redacted(child, known)
            for key, child in value.items()
        }
    if isinstance(value, list | tuple):
        if all(isinstance(child, str) for child in value):
            return redacted_arguments(value, known)
        return [redacted(child, known) for child in value]
    return redacted_text(value, known) if isinstance(value, str) else value


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values of the variables whose names say that they are secret (``VLLM_API_KEY``, ``HF_TOKEN``, ...)."""
    return [value for name, value in environment.items() if value and is_secret_name(name)]


def secret_arguments(arguments: Sequence[str]) -> list[str]:
    """The values that stand under secret names among ``arguments``."""
    found: list[str] = []
    hiding = False
    for word in arguments:
        option, equals, value = word.partition("=")
        if word.startswith("-"):
            secret = is_secret_name(option)
            hiding = secret and not equals
            if secret and equals:
                found.append(value)
        elif hiding:
            found.append(word)
    return found


def _hide_pair(match: re.Match[str]) -> str:
    if not is_secret_name(match["key"]):
        return match[0]
    quote = match["value"][0]
    return f"{match['name']}{quote}{HIDDEN}{quote}"


def _hide_inline(match: re.Match[str]) -> str:
    return f"{match['option']}{match['between']}{HIDDEN}" if is_secret_name(match["option"]) else match[0]
