"""Writes the Grafana dashboard (``deploy/grafana/slos-serve.json``) from the table of panels below.

    python scripts/render_dashboard.py

A panel is a title, a sentence that says how to read it, a unit and its queries. Every query selects by ``model_name``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

TARGET = Path(__file__).parents[1] / "deploy" / "grafana" / "slos-serve.json"
EVERY = "[$__rate_interval]"
MODEL = 'model_name=~"$model"'
WIDTH, HEIGHT = 12, 8


class Panel(NamedTuple):
    """One graph: queries with the legend of their lines."""

    title: str
    text: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def rate(name: str, by: str = "", where: str = "", counter: bool = True) -> str:
    """Sum of a counter's rate by some labels."""
    suffix = "_total" if counter else ""
    chosen = ",".join(part for part in (MODEL, where) if part)
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(slos_serve:{name}{suffix}{{{chosen}}}{EVERY}))"


def quantile(share: float, name: str, by: str = "") -> str:
    """A quantile of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(name + '_bucket', labels, counter=False)})"


def kept(where: str) -> str:
    """Attained over ended requests, aborted ones left out."""
    ended = where or 'verdict=~"admitted|second-best|best-effort|error",slo_class!="none"'
    return f"{rate('attained', 'slo_class', where)} / {rate('requests', 'slo_class', ended)}"


PANELS = (
    Panel(
        "Promises kept",
        "Of the requests that were given a promise of their class, the share that got its times. Alert on this.",
        "percentunit",
        ((kept('verdict=~"admitted|second-best"'), "{{slo_class}}"),),
    ),
    Panel(
        "Attained, promised or not",
        "Share of all requests with an SLO that kept it. The gap to the panel beside it is what did not fit.",
        "percentunit",
        ((kept(""), "{{slo_class}}"),),
    ),
    Panel(
        "Requests by verdict",
        "Requests that ended, a second. Much best effort: the engine is full for that class.",
        "reqps",
        ((rate("requests", "slo_class, verdict"), "{{slo_class}} {{verdict}}"),),
    ),
    Panel(
        "Broken promises",
        "Requests a second whose first token came late (ttft) or whose tokens came too slowly (tpot).",
        "reqps",
        ((rate("slo_violation", "slo_class, verdict, type"), "{{slo_class}} {{verdict}} {{type}}"),),
    ),
    Panel(
        "Time to first token over its target",
        "1 is just in time. The 95th percentile of admitted requests is to stay below 1.",
        "none",
        (
            (quantile(0.5, "ttft_over_target", "slo_class, verdict"), "p50 {{slo_class}} {{verdict}}"),
            (quantile(0.95, "ttft_over_target", "slo_class, verdict"), "p95 {{slo_class}} {{verdict}}"),
        ),
    ),
    Panel(
        "Time per output token over its target",
        "1 is just in time.",
        "none",
        (
            (quantile(0.5, "tpot_over_target", "slo_class, verdict"), "p50 {{slo_class}} {{verdict}}"),
            (quantile(0.95, "tpot_over_target", "slo_class, verdict"), "p95 {{slo_class}} {{verdict}}"),
        ),
    ),
    Panel(
        "What clients were told",
        "Requests a second by verdict and reason. kv_full: memory is short. ttft_too_late, decode_rate: compute is.",
        "reqps",
        ((rate("answers", "verdict, reason"), "{{verdict}} {{reason}}"),),
    ),
    Panel(
        "Room for more promises",
        "How many more requests of a class could be promised now (32 at most). 0 for minutes: add a replica.",
        "none",
        (
            (f"sum by (slo_class) (slos_serve:headroom_requests{{{MODEL}}})", "{{slo_class}}"),
            (f"sum(slos_serve:least_headroom_requests{{{MODEL}}})", "least of any class, all servers"),
        ),
    ),
    Panel(
        "What a newcomer would get",
        "Predicted TTFT of a prompt of 512 tokens that comes now, and time per output token of one more stream. The "
        "servers' spread says whether they are evenly loaded.",
        "s",
        (
            (f"min(slos_serve:standard_ttft_seconds{{{MODEL}}})", "TTFT, best server"),
            (f"max(slos_serve:standard_ttft_seconds{{{MODEL}}})", "TTFT, worst server"),
            (f"min(slos_serve:next_tpot_seconds{{{MODEL}}})", "per output token, best server"),
            (f"max(slos_serve:next_tpot_seconds{{{MODEL}}})", "per output token, worst server"),
        ),
    ),
    Panel(
        "KV cache",
        "Blocks in all, in use, and at the forecast peak of what is promised.",
        "none",
        ((f"sum by (kind) (slos_serve:kv_blocks{{{MODEL}}})", "{{kind}}"),),
    ),
    Panel(
        "Front end and engine",
        "Requests a second by what the client was told and what the engine did.",
        "reqps",
        ((rate("verdict_agreement", "told, did"), "told {{told}}, engine {{did}}"),),
    ),
    Panel(
        "Requests in the engine",
        "Running and waiting, by verdict. Undecided requests may still be admitted.",
        "none",
        ((f"sum by (queue, verdict) (slos_serve:queue_requests{{{MODEL}}})", "{{queue}} {{verdict}}"),),
    ),
    Panel(
        "Predictions",
        "Measured over predicted. Step time far from 1: measure the profile again.",
        "none",
        (
            (quantile(0.5, "step_over_prediction"), "step p50"),
            (quantile(0.95, "step_over_prediction"), "step p95"),
            (quantile(0.5, "ttft_over_prediction"), "first token p50"),
            (quantile(0.9, "answer_over_forecast", "slo_class"), "answer p90 {{slo_class}}"),
            (f"avg(slos_serve:batch_time_correction{{{MODEL}}})", "correction in use"),
        ),
    ),
    Panel(
        "Planning",
        "Time to plan a step.",
        "s",
        ((quantile(0.5, "plan_seconds"), "p50"), (quantile(0.99, "plan_seconds"), "p99")),
    ),
    Panel(
        "Steps in stock order, preemptions, holds",
        "What the plug-in did not plan, and what it asked for.",
        "ops",
        (
            (rate("step_fallback", "kind"), "stock order: {{kind}}"),
            (rate("preemptions", "kind"), "preempted: {{kind}}"),
            (rate("held_decodes"), "decodes held"),
        ),
    ),
    Panel(
        "Health",
        "Armed is 1 while steps are planned, and is to stay there. Asynchronous scheduling is 1 where the next step is "
        "planned while one runs. The others are to stay at 0.",
        "none",
        (
            (f"min(slos_serve:armed{{{MODEL}}})", "armed"),
            (f"min(slos_serve:async_scheduling{{{MODEL}}})", "asynchronous scheduling"),
            (f"sum(slos_serve:profile_mismatch{{{MODEL}}})", "servers with another engine's profile"),
            (f"sum(slos_serve:telemetry_dropped{{{MODEL}}})", "telemetry dropped"),
            (f"sum(slos_serve:invalid_slo_fields_total{{{MODEL}}})", "unusable SLO fields"),
            (f'sum(slos_serve:class_file_reloads_total{{{MODEL},result="kept_old"}})', "class files not taken"),
            (f"sum(slos_serve:denied_total{{{MODEL}}})", "denied to tenants"),
        ),
    ),
    Panel(
        "Tasks kept",
        "Share of whole tasks that ended in time: of those whose every call was promised its share, and of all.",
        "percentunit",
        tuple(
            (
                f"{rate('tasks_attained', 'slo_class', where)} / {rate('tasks', 'slo_class', where)}",
                f"{{{{slo_class}}}}{said}",
            )
            for where, said in (('verdict="admitted"', ", promised"), ('verdict!="aborted"', ", all"))
        ),
    ),
    Panel(
        "Longest prompt that could be promised",
        "Prompt tokens, by class, on the server with most room.",
        "none",
        ((f"max by (slo_class) (slos_serve:headroom_prefill_tokens{{{MODEL}}})", "{{slo_class}}"),),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    model = {
        "name": "model",
        "type": "query",
        "label": "Model",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(slos_serve:armed, model_name)", "refId": "model"},
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "title": "SLOs-Serve",
        "uid": "slos-serve",
        "schemaVersion": 39,
        "version": 2,
        "tags": ["llm", "slo"],
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [source, model]},
        "annotations": {"list": []},
        "panels": [_panel(index, panel) for index, panel in enumerate(PANELS)],
    }


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    limits = {"min": 0, "max": 1} if panel.unit == "percentunit" else {"min": 0}
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": {"x": index % 2 * WIDTH, "y": index // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, **limits}, "overrides": []},
        "options": {"legend": {"displayMode": "table", "placement": "right", "calcs": ["mean", "lastNotNull"]}},
        "targets": [
            {"refId": chr(ord("A") + at), "expr": query, "legendFormat": legend, "datasource": source}
            for at, (query, legend) in enumerate(panel.queries)
        ],
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text(), encoding="utf-8")
    print(TARGET)
