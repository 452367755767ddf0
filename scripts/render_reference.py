"""Writes the reference pages of docs/ from the code: ``python scripts/render_reference.py``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args, get_origin

import click
from typer.main import get_command
from typer.testing import CliRunner

from slos_serve.cli.main import COMMANDS, app
from slos_serve.core.slo import MAX_LATENCY_MS
from slos_serve.core.tasks import MAX_TASK_CALLS
from slos_serve.core.verdict import SENTENCES, Verdict
from slos_serve.files.class_schema import class_file_schema
from slos_serve.vllm_plugin.front.metrics import FrontMetrics
from slos_serve.vllm_plugin.metrics import COMMON, EngineLabels, SchedulerMetrics
from slos_serve.vllm_plugin.slo_args import (
    HEADER_KEYS,
    MAX_EXPECTED_TOKENS,
    MAX_NAME_CHARS,
    MAX_SESSION_CHARS,
    SESSION_HEADER,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
_WRITTEN = "Written by `python scripts/render_reference.py` from `{source}`."


def class_file_page() -> str:
    """Every key of the class file, from the schema that editors check with."""
    schema = class_file_schema()
    of_class = schema["properties"]["classes"]["additionalProperties"]["properties"]
    parts = [
        ("At the top of the file", schema["properties"]),
        ("Of a class", of_class),
        ("Of a stage", of_class["stages"]["items"]["properties"]),
    ]
    page = f"""# Class file

{_WRITTEN.format(source="src/slos_serve/files/class_schema.py")}
[Classes and promises](classes.md) explains how to choose the numbers, [Promises](promises.md) what each means and the
sections `trust` and `map`. `slos-serve classes check FILE` checks a file;
`slos-serve classes schema` prints the JSON Schema for editors.

```yaml
default_class: chat
classes:
  chat:   {{ttft_slowdown: 5, tpot_ms: 100}}
  code:   {{ttft_ms: 1500, tpot_ms: 50, weight: 2}}
  reason:
    ttft_slowdown: 5
    stages:
      - {{tpot_ms: 50, end_token_id: 151668}}
      - {{tpot_ms: 100}}
  batch:  {{}}
```

An unknown key, a key given twice or a number out of range is an error that names file, line, field, value and range.
The class names `none` and `custom` are taken.
"""
    for title, keys in parts:
        rows = [
            f"| `{name}` | {_allowed(entry)} | {_default(entry)} | {_said(name, entry)} |"
            for name, entry in keys.items()
        ]
        page += f"\n## {title}\n\n| key | allowed | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    return page


def _said(name: str, entry: Mapping[str, Any]) -> str:
    if name == "scheduler":
        return "The planner's settings: [settings.md](settings.md)."
    return re.sub(r"\b([a-z]+_[a-z_0-9]+)\b", r"`\1`", str(entry["description"]))


def _default(entry: Mapping[str, Any]) -> str:
    value = entry.get("default")
    return "" if value is None else f"`{value:g}`" if isinstance(value, int | float) else f"`{value}`"


def _allowed(entry: Mapping[str, Any]) -> str:
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    kind = entry["type"]
    if kind in ("number", "integer"):
        low = entry.get("minimum", entry.get("exclusiveMinimum"))
        opening = "[" if "minimum" in entry else "("
        return f"{'whole number' if kind == 'integer' else 'number'} in {opening}{low:,}, {entry['maximum']:,.0f}]"
    if kind == "array":
        return f"list of {entry['minItems']} to {entry['maxItems']}"
    if "maxProperties" in entry:
        return f"1 to {entry['maxProperties']} classes"
    return "name of a class" if kind == "string" else "mapping"


REQUEST_FIELDS = {
    "slo_class": f"A class, at most {MAX_NAME_CHARS} characters. `none` takes the request out of the default class.",
    "slo_ttft_ms": "Milliseconds to the first token: this request's own promise.",
    "slo_tpot_ms": "Milliseconds per output token, for every stage of this request.",
    "slo_e2e_ms": "Milliseconds from the arrival to the last token of this request.",
    "slo_due_at": "When the last token is due, in Unix seconds; the earlier counts where `slo_e2e_ms` is given too.",
    "slo_task_ms": "Milliseconds for a whole task: from the first call of a `session_id` to the end of its last.",
    "slo_task_calls": f"Whole number, 1 to {MAX_TASK_CALLS:,}: a hint of how many calls the task has.",
    "slo_expected_tokens": f"Whole number, 1 to {MAX_EXPECTED_TOKENS:,}: a hint of the answer's length.",
    "slo_last_round": "0 or 1: no further call of this session follows (`last_round` of its class); its task ends.",
    "session_id": "Conversation or agent loop that this call belongs to (vLLM's own key); "
    f"1 to {MAX_SESSION_CHARS} characters in the header.",
}
RESPONSE_HEADERS = {
    "x-slo-class": "Class applied: its name, `custom` for numbers without a class, `none` for no promise.",
    "x-slo-ttft-ms": "First-token promise of the class in milliseconds, when it is absolute.",
    "x-slo-ttft-slowdown": "First-token promise as a multiple of the prompt's time alone, when it is one.",
    "x-slo-tpot-ms": "Time per output token promised in the first stage.",
    "x-slo-e2e-ms": "Time from the arrival to the last token promised.",
    "x-slo-task-ms": "Time promised to the whole task.",
    "x-slo-denied": "Why a request is served without the promise it asked for: `class`, `numbers` or `promises`; "
    "see [who may ask](promises.md#who-may-ask).",
    "x-slo-verdict": "What the request is given; see below.",
    "x-slo-reason": "Why, as a token; see below.",
    "x-slo-reason-text": "The reason as a sentence.",
    "x-slo-rank": "Which promise of `otherwise` a `second-best` request is given; 1 is the first one.",
    "x-slo-target-ttft-ms": "First-token promise of this request in milliseconds.",
    "x-slo-target-tpot-ms": "Time per output token promised to this request in the first stage.",
    "x-slo-target-e2e-ms": "What this call may take of its task: from its arrival to its last token.",
    "x-slo-task-left-ms": "What was left of the task when this call came.",
    "x-slo-predicted-ttft-ms": "Predicted time to first token of an admitted request.",
    "x-slo-predicted-tpot-ms": "Predicted time per output token of an admitted request.",
    "x-slo-predicted-start-ms": "Predicted time to first token of a request that is promised nothing; a forecast "
    "of what is left over.",
    "x-llm-d-request-dropped-reason": "`rejected-saturated` on a refusal, for llm-d's gateway.",
    "endpoint-load-metrics": "Load report (ORCA), where the request asks for it with "
    "`endpoint-load-metrics-format: TEXT` or `JSON`: `slos_serve_least_headroom_requests`, "
    "`slos_serve_standard_ttft_seconds` and `slos_serve_next_tpot_seconds` beside vLLM's own numbers, on streams too.",
}


def headers_page() -> str:
    """What a request may say and what an answer says."""
    names: dict[str, list[str]] = {key: [] for key in REQUEST_FIELDS}
    for header, key in {**HEADER_KEYS, SESSION_HEADER: "session_id"}.items():
        names[key].append(f"`{header}`")
    asked = [f"| {', '.join(names[key])} | `{key}` | {said} |" for key, said in REQUEST_FIELDS.items()]
    told = [f"| `{name}` | {said} |" for name, said in RESPONSE_HEADERS.items()]
    verdicts = [f"| `{verdict.value}` | {said} |" for verdict, said in _verdicts().items()]
    reasons = [f"| `{reason.value}` | {said} |" for reason, said in SENTENCES.items()]
    written = _WRITTEN.format(source="src/slos_serve/vllm_plugin/slo_args.py` and `core/verdict.py")
    return f"""# Headers and fields

{written}

## Request

A header counts over `vllm_xargs` in the body. Both count over the class. Milliseconds are above 0 and at most
{MAX_LATENCY_MS:,.0f}; headers hold digits with at most one decimal point. A value that cannot be used is answered 400
with the field's name. So is an unknown `slo_*` key.

| header | key in `vllm_xargs` | value |
|---|---|---|
{chr(10).join(asked)}

## Answer

| header | value |
|---|---|
{chr(10).join(told)}

## Verdicts

| `x-slo-verdict` | what the request is given |
|---|---|
{chr(10).join(verdicts)}

## Reasons

| `x-slo-reason` | sentence |
|---|---|
{chr(10).join(reasons)}
"""


def _verdicts() -> dict[Verdict, str]:
    """Each verdict with its docstring, which Python does not keep."""
    source = (DOCS.parent / "src" / "slos_serve" / "core" / "verdict.py").read_text(encoding="utf-8")
    said = dict(re.findall(r'^    ([A-Z_]+) = "[a-z-]+"\n    """(.*?)"""', source, flags=re.MULTILINE))
    return {verdict: said[verdict.name] for verdict in Verdict}


def metrics_page() -> str:
    """Every series of a server."""
    rows = []
    for registry in (SchedulerMetrics([]).registry, FrontMetrics([], EngineLabels()).registry):
        collectors: list[Any] = list(registry._collector_to_names)
        for collector in collectors:
            family = next(iter(collector.describe()))
            labels = getattr(collector, "_labelnames", ())
            own = [f"`{label}`" for label in labels if label not in COMMON]
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append(f"| `{name}` | {family.type} | {', '.join(own)} | {family.documentation} |")
    written = _WRITTEN.format(source="src/slos_serve/vllm_plugin/metrics.py` and `front/metrics.py")
    return f"""# Metrics

{written}
They are on `/metrics` beside vLLM's own, and have vLLM's labels `model_name` and `engine`. `slo_class` is a class of
the file, `custom` or `none`, never a client's text. [Operating](operating.md) says what to watch, and
[vllm.md](vllm.md#metrics) tells more of each.

| metric | type | labels | meaning |
|---|---|---|---|
{chr(10).join(sorted(rows))}
"""


def cli_page() -> str:
    """Every command with its options, as ``--help`` has them."""
    page = f"""# Commands

{_WRITTEN.format(source="src/slos_serve/cli/")}
`slos-serve COMMAND --help` prints the same. `serve` and `profile` hand every option that is not listed here to vLLM.
Every command ends with 0 (done), 1 (it ran and failed, or found something wrong), 2 (nothing was run: the command line,
a file or a variable cannot be used) or 130 (interrupted).
"""
    whole: Any = get_command(app)  # typer has a copy of click of its own, with types of its own
    context = click.Context(whole, info_name="slos-serve")
    for name in COMMANDS:
        for words, command in _commands(context, name):
            page += f"\n## {words}\n\n{_help_of(command)}\n" + _options(command)
    return page


def explained_block() -> str:
    """What the example of the troubleshooting page prints, with the class file of the five-minutes page."""
    classes = re.findall(r"```yaml\n(.*?)```", (DOCS / "five-minutes.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    found = re.search(r"^slos-serve (explain --classes .*)$", page, re.MULTILINE)
    assert found is not None
    with TemporaryDirectory() as folder:
        (Path(folder) / "classes.yaml").write_text(classes, encoding="utf-8")
        words = found[1].replace("classes.yaml", f"{folder}/classes.yaml").split()
        return f"```\n{CliRunner().invoke(app, words).output}```\n"


def troubleshooting_page() -> str:
    """The page with the example's output in its place."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    before, _, rest = page.partition("<!-- explained -->\n")
    return before + "<!-- explained -->\n" + explained_block() + "<!-- end -->" + rest.partition("<!-- end -->")[2]


def _commands(context: click.Context, name: str) -> Iterator[tuple[str, Any]]:
    group: Any = context.command
    found = group.get_command(context, name)
    if hasattr(found, "commands"):
        for inner, command in found.commands.items():
            yield f"slos-serve {name} {inner}", command
    else:
        yield f"slos-serve {name}", found


def _help_of(command: Any) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))


def _options(command: Any) -> str:
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        shown = " / ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        if parameter.param_type_name == "argument":
            shown = f"`{(parameter.metavar or parameter.name).upper()}`"
        said = " ".join((getattr(parameter, "help", "") or "").split()).replace("|", "\\|")
        rows.append(f"| {shown} | {_value(parameter)} | {_default_of(parameter)} | {said} |")
    return "\n| option | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n" if rows else ""


def _value(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation
    if getattr(parameter, "is_flag", False):
        return ""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    return {int: "whole number", float: "number", Path: "file", str: "text"}.get(kind, "text")


def _default_of(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or value == () or callable(value) or repr(value).startswith("Sentinel"):
        return ""
    return (
        "on" if value is True else f"`{value:g}`" if isinstance(value, float) else f"`{getattr(value, 'value', value)}`"
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "class-file.md": class_file_page,
    "headers.md": headers_page,
    "metrics.md": metrics_page,
    "cli.md": cli_page,
    "troubleshooting.md": troubleshooting_page,
}


if __name__ == "__main__":
    for page_name, write in PAGES.items():
        (DOCS / page_name).write_text(write(), encoding="utf-8")
