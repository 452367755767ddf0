"""JSON Schema of the class file, for editors that complete and check YAML.

Made from the same tables that the reader checks with. What JSON Schema cannot say (a class that ``last_round`` names,
the last stage's end) only the reader finds: ``slos-serve classes check``.
"""

from __future__ import annotations

from typing import Any

from slos_serve.core.slo import (
    DEFAULT_MAX_STALL_MS,
    DEFAULT_TTFT_FLOOR_MS,
    MAX_CLASSES,
    MAX_LATENCY_MS,
    MAX_OTHERWISE,
    MAX_WEIGHT,
    WhenFull,
)
from slos_serve.core.tasks import MAX_TASK_CALLS
from slos_serve.core.tiers import BODY_FIELDS, MAX_MAPPED
from slos_serve.core.trust import MAX_PER_MINUTE, MAX_TENANTS, WhenDenied
from slos_serve.files.class_file import MAX_STAGE_TOKENS, MAX_STAGES, PAUSES
from slos_serve.files.trust_section import DIGEST_PATTERN, HEADER_PATTERN
from slos_serve.planning.settings import RANGES, WHOLE, PlannerSettings

_MS = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_LATENCY_MS}
_DEFAULT = "Class of the requests that name none. Without it they run as in stock vLLM."
_SLOWDOWN = "The first token comes within this multiple of the prompt's time alone. Instead of ttft_ms."
_STALL = "Longest gap that the scheduler may cause between two tokens of a stream."
_WHEN_FULL = (
    "A request that cannot be promised now is served without a promise (best_effort), or refused at once with 429 "
    "(reject) or 503 (reject_503) and Retry-After."
)
_LAST_ROUND = "Class that a call gets instead when the client marks it as its session's last (slo_last_round)."
_TASK = "The whole task, all calls of a session_id, within this many milliseconds of its first call."
_TASK_CALLS = "How many calls a task has, where that is known; else it is learnt."
_TASK_PAUSES = "Time between a task's calls, in tools: it counts (count) or only time in the server does (free)."
_ONE_TTFT = {
    "not": {"required": ["ttft_ms", "ttft_slowdown"]},
    "dependentRequired": {"ttft_floor_ms": ["ttft_slowdown"]},
}
_NAME = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"


def class_file_schema() -> dict[str, Any]:
    """The schema (draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "SLOs-Serve class file",
        "type": "object",
        "additionalProperties": False,
        "required": ["classes"],
        "properties": {
            "default_class": {"type": "string", "description": _DEFAULT},
            "max_stall_ms": {**_MS, "default": DEFAULT_MAX_STALL_MS, "description": "max_stall_ms of all classes."},
            "classes": {
                "type": "object",
                "description": "Promises by class name. A class without promises (batch: {}) is best effort.",
                "minProperties": 1,
                "maxProperties": MAX_CLASSES,
                "propertyNames": {"pattern": _NAME, "not": {"enum": ["none", "custom"]}},
                "additionalProperties": _class_schema(),
            },
            "scheduler": _scheduler_schema(),
            "trust": _trust_schema(),
            "map": _map_schema(),
        },
    }


def _class_schema() -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            **_promise_properties(),
            "otherwise": {
                "type": "array",
                "description": "Weaker promises, asked for in order once the one before cannot be kept.",
                "minItems": 1,
                "maxItems": MAX_OTHERWISE,
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "minProperties": 1,
                    "properties": _promise_properties(),
                    **_ONE_TTFT,
                },
            },
            "task_ms": {**_MS, "description": _TASK},
            "task_calls": {"type": "integer", "minimum": 1, "maximum": MAX_TASK_CALLS, "description": _TASK_CALLS},
            "task_pauses": {"enum": list(PAUSES), "default": PAUSES[0], "description": _TASK_PAUSES},
            "weight": {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": MAX_WEIGHT,
                "default": 1,
                "description": "What a kept promise of this class is worth, relative to others. "
                "Below 1 it also leaves more room for requests to come.",
            },
            "max_stall_ms": {**_MS, "default": DEFAULT_MAX_STALL_MS, "description": _STALL},
            "when_full": {
                "enum": [kind.value for kind in WhenFull],
                "default": WhenFull.BEST_EFFORT.value,
                "description": _WHEN_FULL,
            },
            "last_round": {"type": "string", "description": _LAST_ROUND},
            "stages": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_STAGES,
                "items": _stage_schema(),
                "description": "Decode stages in order, for answers that think first. The last one runs to the end.",
            },
        },
        "not": {"anyOf": [_ONE_TTFT["not"], {"required": ["task_ms", "otherwise"]}]},
        "dependentRequired": {**_ONE_TTFT["dependentRequired"], "task_calls": ["task_ms"], "task_pauses": ["task_ms"]},
    }


def _promise_properties() -> dict[str, Any]:
    number = {"type": "number", "minimum": 1, "maximum": 10_000}
    return {
        "ttft_ms": {**_MS, "description": "The first token comes within this many milliseconds."},
        "ttft_slowdown": {**number, "description": _SLOWDOWN},
        "ttft_floor_ms": {
            **_MS,
            "default": DEFAULT_TTFT_FLOOR_MS,
            "description": "Least time that ttft_slowdown may ask for.",
        },
        "tpot_ms": {**_MS, "description": "Mean time per output token after the first, in each stage without one."},
        "e2e_ms": {**_MS, "description": "The complete answer within this many milliseconds of the arrival."},
    }


def _stage_schema() -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "tpot_ms": {**_MS, "description": "Mean time per output token in this stage."},
            "end_token_id": {
                "type": "integer",
                "minimum": 0,
                "maximum": MAX_STAGE_TOKENS,
                "description": "Token that ends the stage, such as a think-end token.",
            },
            "max_tokens": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_STAGE_TOKENS,
                "description": "The stage ends after this many tokens.",
            },
        },
    }


def _trust_schema() -> dict[str, Any]:
    digest = {"type": "string", "pattern": DIGEST_PATTERN}
    return {
        "type": ["object", "null"],
        "description": "Who may ask for what.",
        "additionalProperties": False,
        "properties": {
            "tenant_header": {"type": "string", "pattern": HEADER_PATTERN, "description": "Set by the proxy."},
            "api_keys": {
                "type": "object",
                "description": "SHA-256 of each tenant's API keys.",
                "additionalProperties": {"anyOf": [digest, {"type": "array", "items": digest}]},
            },
            "custom_numbers": {"type": "boolean", "default": False},
            "when_denied": {"enum": [kind.value for kind in WhenDenied]},
            "tenants": {"type": "object", "maxProperties": MAX_TENANTS, "additionalProperties": _rule_schema()},
            "others": _rule_schema(),
        },
    }


def _rule_schema() -> dict[str, Any]:
    per_minute = {"type": "number", "minimum": 1, "maximum": MAX_PER_MINUTE}
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "classes": {"type": "array", "items": {"type": "string"}},
            "custom_numbers": {"type": "boolean"},
            "promises_per_minute": per_minute,
            "tokens_per_minute": per_minute,
        },
    }


def _map_schema() -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "description": "The class that a value of a field or header of others stands for.",
        "propertyNames": {"anyOf": [{"enum": list(BODY_FIELDS)}, {"pattern": HEADER_PATTERN}]},
        "additionalProperties": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": MAX_MAPPED,
            "additionalProperties": {"type": "string"},
        },
    }


def _scheduler_schema() -> dict[str, Any]:
    defaults = PlannerSettings()
    properties = {
        name: {
            "type": "integer" if name in WHOLE else "number",
            "minimum" if included else "exclusiveMinimum": low,
            "maximum": high,
            "default": getattr(defaults, name),
        }
        for name, (low, high, included) in RANGES.items()
    }
    return {"type": ["object", "null"], "additionalProperties": False, "properties": properties}
