"""JSON Schema of the class file, for editors that complete and check YAML.

Made from the same tables that the reader checks with. What JSON Schema cannot say (a class that ``last_round`` names,
the last stage's end) only the reader finds: ``slos-serve classes check``.
"""

from __future__ import annotations

from typing import Any

from slos_serve.core.slo import MAX_CLASSES, MAX_LATENCY_MS, MAX_WEIGHT, WhenFull
from slos_serve.files.class_file import MAX_STAGE_TOKENS, MAX_STAGES
from slos_serve.planning.settings import RANGES, WHOLE, PlannerSettings

_MS = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_LATENCY_MS}
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
            "default_class": {"type": "string", "description": "Class of requests that name none."},
            "max_stall_ms": {**_MS, "description": "Longest gap between two tokens that the scheduler may cause."},
            "classes": {
                "type": "object",
                "minProperties": 1,
                "maxProperties": MAX_CLASSES,
                "propertyNames": {"pattern": _NAME, "not": {"enum": ["none", "custom"]}},
                "additionalProperties": _class_schema(),
            },
            "scheduler": _scheduler_schema(),
        },
    }


def _class_schema() -> dict[str, Any]:
    number = {"type": "number", "minimum": 1, "maximum": 10_000}
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "ttft_ms": {**_MS, "description": "First token within this many milliseconds."},
            "ttft_slowdown": {**number, "description": "First token within this multiple of the prompt's time alone."},
            "ttft_floor_ms": {**_MS, "description": "Least TTFT that ttft_slowdown asks for."},
            "tpot_ms": {**_MS, "description": "Mean time per output token after the first."},
            "weight": {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": MAX_WEIGHT,
                "description": "What a kept promise of this class is worth, relative to others.",
            },
            "max_stall_ms": _MS,
            "when_full": {
                "enum": [kind.value for kind in WhenFull],
                "description": "What becomes of a request that cannot be promised now.",
            },
            "last_round": {"type": "string", "description": "Class of a session's last call."},
            "stages": {"type": "array", "minItems": 1, "maxItems": MAX_STAGES, "items": _stage_schema()},
        },
        "not": {"required": ["ttft_ms", "ttft_slowdown"]},
        "dependentRequired": {"ttft_floor_ms": ["ttft_slowdown"]},
    }


def _stage_schema() -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "tpot_ms": _MS,
            "end_token_id": {"type": "integer", "minimum": 0, "maximum": MAX_STAGE_TOKENS},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_STAGE_TOKENS},
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
