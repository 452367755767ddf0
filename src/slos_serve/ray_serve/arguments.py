"""Which arguments of vLLM's server replicas take, by an allow-list.

Replicas under Ray Serve have vLLM's engine and no HTTP side of vLLM's: an argument of that side would be accepted and
do nothing. Allowed is what an engine takes (the fields of vLLM's own ``EngineArgs``) and the part of the front end that
turns requests into prompts and answers. The endpoint itself does ``--api-key`` and TLS. All else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from slos_serve.core.errors import InvalidFieldError

# Of vLLM's front end: these act in the replica, where chat messages become prompts and tokens become answers.
PROMPT_ARGUMENTS = frozenset(
    {
        "chat_template",
        "chat_template_content_format",
        "default_chat_template_kwargs",
        "enable_auto_tool_choice",
        "enable_force_include_usage",
        "enable_log_deltas",
        "enable_log_outputs",
        "enable_prompt_tokens_details",
        "exclude_tools_when_tool_choice_none",
        "max_log_len",
        "response_role",
        "return_tokens_as_token_ids",
        "tool_call_parser",
        "tool_parser_plugin",
        "tool_strict_level",
        "trust_request_chat_template",
        "trust_request_mm_kwargs",
    }
)
# Done by the endpoint or by the deployment; not handed to the engine.
ENDPOINT_ARGUMENTS = frozenset(
    {"api_key", "config", "host", "model", "model_tag", "port", "served_model_name"}
    | {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
)
_PROXY = "set it on the proxy in front"
REFUSED: Mapping[str, str] = {
    "api_key": "set VLLM_API_KEY in the environment of the process that builds the application",
    "ssl_ca_certs": "set it in Ray Serve's http_options",
    "ssl_certfile": "set it in Ray Serve's http_options",
    "ssl_keyfile": "set it in Ray Serve's http_options",
    "allow_credentials": _PROXY,
    "allowed_headers": _PROXY,
    "allowed_methods": _PROXY,
    "allowed_origins": f"Ray Serve's endpoint allows every origin; {_PROXY}",
    "root_path": _PROXY,
    "uds": "Ray Serve's endpoint listens on TCP; use --host and --port",
    "headless": "Ray Serve starts the engines itself",
    "api_server_count": "Ray Serve starts the endpoint itself",
    "middleware": "the endpoint has its own; put other middleware into the proxy in front",
    "hf_token": "it would be stored in Ray's deployment configuration; set HF_TOKEN in the environment",
    "scheduler_cls": "slos-serve sets it",
    "lora_modules": "the endpoint knows one model name; serve adapters with a single server",
    "ssl_cert_reqs": "Ray Serve decides by --ssl-ca-certs alone",
}
# Engines that share one scheduler's replica would publish over each other: a replica is one engine.
_DATA_PARALLEL = "data_parallel"
_ONE_ENGINE = "each replica is one engine; ask for more replicas instead"
_FRONT_END = "it belongs to the HTTP side of vLLM's own server, which --replicas does not start"


def engine_arguments(given: Mapping[str, Any], where: str = "--replicas") -> dict[str, Any]:
    """Those of ``given`` that go to each replica's engine.

    Args:
        given: vLLM arguments by name, with underscores.
        where: what they were given with, for the message.

    Raises:
        InvalidFieldError: names the first argument that replicas do not take, and why.
    """
    allowed = engine_fields() | PROMPT_ARGUMENTS
    found = {}
    for name, value in given.items():
        if name in REFUSED or name not in allowed or name.startswith(_DATA_PARALLEL):
            raise refused(name, where)
        found[name] = value
    return found


def engine_fields() -> frozenset[str]:
    """Names of the engine's own arguments in the vLLM installed here."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - takes seconds

    return frozenset(field.name for field in fields(AsyncEngineArgs))


def refused(name: str, where: str) -> InvalidFieldError:
    """The error for an argument that replicas do not take; its value may be a secret and is not shown."""
    why = _ONE_ENGINE if name.startswith(_DATA_PARALLEL) else REFUSED.get(name, _FRONT_END)
    return InvalidFieldError(f"--{name.replace('_', '-')}", "a value", f"not with {where}: {why}")


def refuse_early(options: Iterable[str]) -> None:
    """Refuse what is known by name alone, before vLLM is imported.

    Args:
        options: words of a command line; values among them are ignored.
    """
    for word in options:
        name = word.partition("=")[0]
        field = name[2:].replace("-", "_") if name.startswith("--") else ""
        if (field in REFUSED and field not in ENDPOINT_ARGUMENTS) or field.startswith(_DATA_PARALLEL):
            raise refused(field, "--replicas")
