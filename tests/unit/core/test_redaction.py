"""Secrets are taken out of command lines, configurations and messages; what only looks like one stays."""

from __future__ import annotations

import pytest

from slos_serve.core.redaction import (
    is_secret_name,
    redacted,
    redacted_arguments,
    redacted_text,
    secret_arguments,
    secrets_of,
)

KEY = "sk-0123456789"


@pytest.mark.parametrize(
    "given",
    [
        ["--api-key", KEY],
        ["--api-key", "first", KEY],
        [f"--api-key={KEY}"],
        ["--api_key", KEY],
        ["--api-k", KEY],
        ["--hf-token", KEY],
        ["--ssl-keyfile-password", KEY],
        ["--kv-transfer-config", f'{{"extra": {{"password": "{KEY}"}}}}'],
        ["--kv-transfer-config.extra.password", KEY],
        ["--model", f"redis://user:{KEY}@host:6379/0"],
        ["--hf-overrides", f'{{"apiKey": "{KEY}"}}'],
        [f"--served-model-name=x{KEY}x"],
    ],
)
def test_no_secret_is_left_of_a_command_line(given: list[str]) -> None:
    known = [KEY] if "served" in given[0] else []
    shown = redacted_arguments(["serve", "m", *given, "--max-model-len", "64"], known)
    assert KEY not in " ".join(shown)
    assert "***" in " ".join(shown)
    assert shown[:2] == ["serve", "m"] and shown[-2:] == ["--max-model-len", "64"]


def test_what_only_looks_like_a_secret_stays() -> None:
    words = ["--max-num-batched-tokens", "64", "--ssl-keyfile", "k.pem", "--tokenizer", "t", "--api-server-count", "2"]
    words += ["--return-tokens-as-token-ids", "--trust-remote-code", "--hf-config-path", "p"]
    assert redacted_arguments(words) == words
    assert not secret_arguments(words)


def test_values_under_secret_names_are_found() -> None:
    words = ["--api-key", "a", "b", "--x", "c", "--hf-token=d", "--api-key"]
    assert secret_arguments(words) == ["a", "b", "d"]
    assert secrets_of({"VLLM_API_KEY": "a", "HF_TOKEN": "b", "PATH": "/bin", "AWS_SECRET_ACCESS_KEY": ""}) == ["a", "b"]


def test_nested_values_are_redacted_by_name_and_by_value() -> None:
    given = {"api_key": [KEY], "a": [{"token": KEY, "n": 1}], "args": ["--api-key", "x"], "said": f"see {KEY}"}
    assert redacted(given, [KEY]) == {
        "api_key": "***",
        "a": [{"token": "***", "n": 1}],
        "args": ["--api-key", "***"],
        "said": "see ***",
    }


def test_messages_are_redacted() -> None:
    said = f"cannot run 'vllm --api-key {KEY} --port 1' with {{'api_key': '{KEY}', \"port\": \"1\"}}"
    assert KEY not in redacted_text(said)
    assert "--port 1" in redacted_text(said) and '"port": "1"' in redacted_text(said)


@pytest.mark.parametrize(
    ("name", "secret"),
    [("VLLM_API_KEY", True), ("HF_TOKEN", True), ("--api-key", True), ("--max-tokens", False), ("monkey", False)],
)
def test_names_that_are_secret(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret
