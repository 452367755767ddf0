"""A run's table for other programs: CSV, and one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from slos_serve.bench.report import pair_text
from slos_serve.metrics.summary import ClassSummary

CSV_COLUMNS = (
    "class",
    "requests",
    "attained",
    "attained_rate",
    "attained_low",
    "attained_high",
    "strict",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "longest_stall_ms",
    "rejected",
    "errors",
)
_HEADS = ("class", "requests", "kept", "95 % interval", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", "rejected", "errors")
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}"
    "th,td{padding:.3rem .6rem;border-bottom:1px solid #8884;text-align:right}"
    "th:first-child,td:first-child{text-align:left}@media(prefers-color-scheme:dark){body{background:#111;color:#eee}}"
)


def class_csv(rows: Sequence[ClassSummary]) -> str:
    """One line a class, then the total; a number that does not exist is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        rated = row.has_slo and row.requests > 0
        interval = (row.attained_rate, row.attained_low, row.attained_high) if rated else (None, None, None)
        times = (row.ttft_ms.p50, row.ttft_ms.p99, row.tpot_ms.p50, row.tpot_ms.p99, row.longest_stall_ms)
        values = (row.name, row.requests, row.attained, *interval, row.strict, *times, row.rejected, row.errors)
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
    return text.getvalue()


def class_html(rows: Sequence[ClassSummary], title: str, facts: dict[str, Any], warnings: Sequence[str]) -> str:
    """One page: the table, what was run, and what to know before believing it.

    Args:
        rows: of the table.
        title: of the page.
        facts: what was run, by name; ``None`` is left out.
        warnings: about the run itself.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in _HEADS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(row))}</tr>" for row in rows)
    known = {name: str(value) for name, value in facts.items() if value is not None}
    told = "".join(f"<li>{escape(name)}: {escape(value)}</li>" for name, value in known.items())
    warned = "".join(f"<p><strong>Warning:</strong> {escape(text)}</p>" for text in warnings)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1>{warned}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<h2>What was run</h2><ul>{told}</ul></body></html>\n"
    )


def _cells(row: ClassSummary) -> tuple[str, ...]:
    rated = row.has_slo and row.requests > 0
    return (
        row.name,
        str(row.requests),
        f"{row.attained} ({row.attained_rate:.1%})" if rated else "-",
        f"{row.attained_low:.1%} - {row.attained_high:.1%}" if rated else "-",
        pair_text(row.ttft_ms),
        pair_text(row.tpot_ms),
        str(row.rejected),
        str(row.errors),
    )
