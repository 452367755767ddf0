"""The record of a run: JSON lines that hold what a replay or a later analysis needs.

The first line describes the run; one line may say how much of the client's machine was stolen when; each further line
is one request. Times count from the run's start, in seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slos_serve.bench.requests import LoadResult, Response
from slos_serve.metrics.attainment import StageTarget
from slos_serve.metrics.summary import ScoredRequest

RECORD_FORMAT = "slos-serve-record/1"


def write_record(
    path: Path,
    header: Mapping[str, Any],
    load: LoadResult,
    scored: Sequence[ScoredRequest],
    targets: Sequence[Sequence[StageTarget]],
    verdicts: Mapping[str, str] | None = None,
) -> None:
    """Write a run.

    Args:
        path: file to write.
        header: what is known of the run (server, model, workload, seed, ...).
        load: the run, its requests in the order of ``scored`` and ``targets``.
        scored, targets: one of each for every request.
        verdicts: the scheduler's word on each request by request id, where known.
    """
    verdicts = verdicts or {}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "run", "format": RECORD_FORMAT, **header}) + "\n")
        if load.stolen:
            times_s, seconds = zip(*load.stolen, strict=True)
            row = {"kind": "stolen", "t_s": [round(t, 3) for t in times_s], "seconds": [round(s, 3) for s in seconds]}
            file.write(json.dumps(row) + "\n")
        for response, score, target in zip(load.responses, scored, targets, strict=True):
            verdict = verdicts.get(response.request.request_id)
            file.write(json.dumps(request_row(response, score, target, verdict)) + "\n")


def request_row(
    response: Response,
    scored: ScoredRequest,
    targets: Sequence[StageTarget],
    verdict: str | None,
    e2e_s: float = math.inf,
) -> dict[str, Any]:
    """One request of a record; promises that were not made are ``null``."""
    request = response.request
    times = [round(value, 6) for value in response.token_times_s.tolist()]
    return {
        "kind": "request",
        "request_id": request.request_id,
        "phase": request.phase,
        "arrival_s": round(request.arrival_s, 6),
        "sent_s": round(response.sent_s, 6),
        "ended_s": round(response.ended_s, 6),
        "prompt_tokens": response.prompt_tokens,
        "output_tokens": response.output_tokens,
        "max_tokens": request.max_tokens,
        "slo_class": scored.slo_class,
        "ttft_ms": _finite_ms(targets[0].ttft_s),
        "tpot_ms": [_finite_ms(target.tpot_s) for target in targets],
        "e2e_ms": _finite_ms(e2e_s),
        "first_token_s": times[0] if times else None,
        "token_times_s": times,
        "outcome": scored.outcome.value,
        "status": response.status,
        "error": response.error or None,
        "finish_reason": response.finish_reason,
        "verdict": response.verdict if verdict is None else verdict,
        "reason": response.reason,
        "attained": scored.attained,
        "strict": scored.strict,
    }


def _finite_ms(seconds: float) -> float | None:
    return round(1000.0 * seconds, 3) if math.isfinite(seconds) else None
