"""Replicas take the engine's arguments and refuse those of the HTTP side by name."""

from __future__ import annotations

from dataclasses import fields

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.ray_serve.arguments import (
    ENDPOINT_ARGUMENTS,
    PROMPT_ARGUMENTS,
    REFUSED,
    engine_arguments,
    engine_fields,
    refuse_early,
)

pytest.importorskip("vllm")


def test_arguments_of_the_engine_and_of_prompts_pass() -> None:
    given = {"max_model_len": 64, "quantization": "fp8", "enable_auto_tool_choice": True, "chat_template": "t"}
    assert engine_arguments(given) == given


@pytest.mark.parametrize(
    "name",
    [
        *("allowed_origins", "allow_credentials", "root_path", "uds", "middleware", "headless", "hf_token"),
        *("ssl_cert_reqs", "enable_ssl_refresh", "disable_fastapi_docs", "api_server_count", "lora_modules"),
        *("data_parallel_size", "data_parallel_rank", "data_parallel_external_lb"),
        *("enable_request_id_headers", "scheduler_cls", "api_key", "ssl_keyfile", "no_such_argument"),
    ],
)
def test_an_argument_that_replicas_cannot_act_on_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        engine_arguments({"max_model_len": 64, name: "sk-secret"}, "llm_config.engine_kwargs")
    assert caught.value.field == f"--{name.replace('_', '-')}"
    assert "not with llm_config.engine_kwargs: " in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_every_argument_of_vllms_server_is_decided_on() -> None:
    cli_args = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    for field in fields(cli_args.FrontendArgs):
        allowed = field.name in PROMPT_ARGUMENTS or field.name in engine_fields()
        assert not (allowed and field.name in REFUSED)
        if allowed or field.name in ENDPOINT_ARGUMENTS:
            continue
        with pytest.raises(InvalidFieldError):
            engine_arguments({field.name: None})
    names = {field.name for field in fields(cli_args.FrontendArgs)}
    assert names >= PROMPT_ARGUMENTS, "an argument that vLLM no longer has"


def test_what_is_known_by_name_is_refused_before_vllm_is_imported() -> None:
    refuse_early(["--api-key", "k", "--port", "1", "--max-model-len", "--", "root-path"])
    with pytest.raises(InvalidFieldError, match="--root-path"):
        refuse_early(["--port", "1", "--root_path=/x"])
    with pytest.raises(InvalidFieldError, match="more replicas instead"):
        refuse_early(["--data-parallel-size", "2"])
