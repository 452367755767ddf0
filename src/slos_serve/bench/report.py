"""Results for people and for programs: the table per class, the JSON, the warnings about the run itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from slos_serve.bench.requests import LoadResult, Response
from slos_serve.metrics.summary import TOTAL, ClassSummary, Quantiles, quantiles_ms

LATE_MS = 50.0
"""Lag of the client at p99 above which its own lateness is part of what it measured."""


def class_table(rows: Sequence[ClassSummary], title: str) -> Table:
    """One line a class, then the total."""
    table = Table(title=title, title_justify="left")
    for name in ("class", "requests", "attained", "95 % interval", "strict"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for name in ("TTFT p50/p99 ms", "TPOT p50/p99 ms", "longest stall ms", "rejected", "errors"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.name == TOTAL:
            table.add_section()
        promised = row.has_slo and row.requests > 0
        table.add_row(
            row.name if row.has_slo else f"{row.name} (no SLO)",
            str(row.requests),
            f"{row.attained} ({row.attained_rate:.1%})" if promised else "-",
            f"{row.attained_low:.1%} - {row.attained_high:.1%}" if promised else "-",
            str(row.strict) if promised else "-",
            pair_text(row.ttft_ms),
            pair_text(row.tpot_ms),
            f"{row.longest_stall_ms:.0f}",
            str(row.rejected),
            str(row.errors),
        )
    return table


def pair_text(pair: Quantiles) -> str:
    """``p50 / p99``, or a dash without samples."""
    return "-" if pair.p50 is None or pair.p99 is None else f"{pair.p50:.0f} / {pair.p99:.0f}"


def class_json(row: ClassSummary) -> dict[str, Any]:
    """A summary as JSON has it; a rate over no requests is ``null``."""
    return asdict(row) | {"attained_rate": row.attained_rate if row.requests else None}


def client_json(result: LoadResult) -> dict[str, Any]:
    """How well the client kept its own schedule."""
    lags = [response.lag_s for response in result.responses]
    lag_ms = quantiles_ms(lags)
    return {
        "lag_ms": {**asdict(lag_ms), "max": 1000.0 * max(lags, default=0.0)},
        "late": lag_ms.p99 is not None and lag_ms.p99 > LATE_MS,
    }


def throughput_json(result: LoadResult) -> dict[str, float]:
    """Work done per second of the whole run."""
    prompt = sum(response.prompt_tokens for response in result.responses)
    output = sum(response.output_tokens for response in result.responses)
    wall_s = max(result.wall_s, 1e-9)
    return {
        "wall_s": result.wall_s,
        "requests_per_s": len(result.responses) / wall_s,
        "prompt_tokens_per_s": prompt / wall_s,
        "output_tokens_per_s": output / wall_s,
    }


def error_counts(responses: Sequence[Response]) -> dict[str, int]:
    """How often each failure was seen, most frequent first."""
    return dict(Counter(response.error for response in responses if response.error).most_common())


def warnings_of(result: LoadResult, sent_slo: bool) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    client = client_json(result)
    if client["late"]:
        found.append(
            f"the client itself sent late (lag p99 {client['lag_ms']['p99']:.0f} ms): its machine is too busy for this "
            "rate, so arrivals were less bursty than planned"
        )
    answered = [response for response in result.responses if response.status == 200]
    asked = [response for response in answered if response.request.slo_class is not None]
    if sent_slo and asked and all(response.class_applied is None for response in asked):
        found.append(
            "the server confirmed no SLO class: it was scored but probably not acted on (start it with 'slos-serve "
            "serve', or say --no-send-slo for another server)"
        )
    if answered and all(response.prompt_tokens == 0 for response in answered):
        found.append("the server reports no usage: one chunk is counted as one token")
    return found
