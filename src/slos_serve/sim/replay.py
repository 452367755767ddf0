"""Fidelity: the requests of a recorded run served again in virtual time, and how far the simulation was off.

Each request keeps the time it was sent, its prompt and answer length and its promises; the profile, the engine's limits
and the policy stand for the engine. What is compared is what clients saw: time to first token, time per output token
and whether the promises were kept.

A profile is as old as its measurement, and a shared machine is not as fast today as yesterday. :func:`fit_speed` takes
one factor on every step's time from the first third of the requests; the error is then that of the others. When the
record says how much of the machine a hypervisor took meanwhile, the simulated steps lose the same time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, single_stage
from slos_serve.metrics.attainment import StageTarget, score_request
from slos_serve.sim.model_error import Interruptions
from slos_serve.sim.outcome import score
from slos_serve.sim.recording import Recording
from slos_serve.workload.calls import Workload, empty_calls

QUANTILES = (0.5, 0.9, 0.99)
SPEED_FITTED_ON = 1.0 / 3.0
_SLOWEST, _SPEED_TOLERANCE = 4.0, 0.002
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Fidelity:
    """Measured against simulated.

    Attributes:
        requests: how many are compared, of those that completed in the real run.
        ttft_ms, tpot_ms: quantile -> (measured, simulated, relative error).
        attainment: measured and simulated share, over requests with a promise.
    """

    requests: int
    ttft_ms: dict[str, tuple[float, float, float]]
    tpot_ms: dict[str, tuple[float, float, float]]
    attainment: tuple[float, float]


def read_record(path: Path) -> list[Row]:
    """Completed requests of a record file (``slos-serve bench --record``), by the time they were sent.

    Raises:
        InvalidFieldError: naming file and line.
    """
    if not path.is_file():
        raise InvalidFieldError("record", str(path), "an existing file")
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as fault:
            raise InvalidFieldError("line", line, f"a JSON object ({fault.msg})", where) from fault
        if not isinstance(row, dict) or row.get("kind") != "request" or row.get("outcome") != "completed":
            continue
        for name in ("sent_s", "prompt_tokens", "output_tokens", "token_times_s", "tpot_ms"):
            if name not in row:
                raise InvalidFieldError(name, None, "a value in every request", where)
        if row["token_times_s"] and row["prompt_tokens"] > 0:
            rows.append(row)
    if not rows:
        raise InvalidFieldError("record", str(path), "a record with at least one completed request")
    return sorted(rows, key=lambda row: float(row["sent_s"]))


def read_interruptions(path: Path, rows: Sequence[Row]) -> Interruptions | None:
    """What a record says was stolen from the machine, on the clock of :func:`replay_workload`; ``None`` if nothing.

    Seconds are summed over cores; a batch runs on all of them and waits for the slowest, so each is lost whole.

    Raises:
        InvalidFieldError: naming file and line.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if '"stolen"' not in line:
            continue
        row = json.loads(line)
        if row.get("kind") != "stolen":
            continue
        times, seconds = row.get("t_s"), row.get("seconds")
        if not isinstance(times, list) or not isinstance(seconds, list) or len(times) != len(seconds):
            raise InvalidFieldError("t_s", times, "as many moments as there are seconds", f"{path}:{number}")
        if len(times) > 1 and seconds[-1] > 0.0:
            first_s = float(rows[0]["sent_s"])
            return Interruptions([time_s - first_s for time_s in times], seconds)
    return None


def replay_workload(rows: Sequence[Row], name: str = "replay") -> Workload:
    """The recorded requests; one class a name that the record knows."""
    names = list(dict.fromkeys(str(row.get("slo_class")) for row in rows))
    calls = empty_calls(len(rows))
    first_s = float(rows[0]["sent_s"])
    calls["arrival_s"] = [float(row["sent_s"]) - first_s for row in rows]
    calls["prompt_tokens"] = [row["prompt_tokens"] for row in rows]
    calls["output_tokens"] = calls["first_stage_tokens"] = [len(row["token_times_s"]) for row in rows]
    calls["max_tokens"] = np.maximum([row.get("max_tokens") or 0 for row in rows], calls["output_tokens"])
    calls["class_index"] = [names.index(str(row.get("slo_class"))) for row in rows]
    calls["own_ttft_ms"] = [_number(row.get("ttft_ms")) for row in rows]
    calls["own_tpot_ms"] = [_number(row["tpot_ms"][0] if row["tpot_ms"] else None) for row in rows]
    return Workload(name, tuple(single_stage(name, SLO()) for name in names), calls)


def fitted_on(rows: Sequence[Row]) -> int:
    """How many of the first requests :func:`fit_speed` looks at."""
    return math.ceil(SPEED_FITTED_ON * len(rows))


def fit_speed(rows: Sequence[Row], simulate_at: Callable[[float], Recording]) -> float:
    """Multiple of the profile's step times at which the first requests take as long as they did, in the median.

    Args:
        rows: of the record.
        simulate_at: serves :func:`replay_workload` of ``rows`` with every step taking that multiple.
    """
    count = fitted_on(rows)
    measured_s = np.array([float(row["token_times_s"][-1]) - float(row["sent_s"]) for row in rows[:count]])

    def too_fast(factor: float) -> bool:
        recording = simulate_at(factor)
        last = recording.token_start + recording.workload.calls["output_tokens"] - 1
        return float(np.median(recording.token_s[last[:count]] / measured_s)) < 1.0

    low, high = 1.0 / _SLOWEST, _SLOWEST
    while high / low > 1.0 + _SPEED_TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if too_fast(middle) else (low, middle)
    return math.sqrt(low * high)


def compare(recording: Recording, rows: Sequence[Row], overhead_s: float = 0.0, skip: int = 0) -> Fidelity:
    """Errors of a simulated run of :func:`replay_workload`.

    Args:
        recording: the simulated run.
        rows: the measured one.
        overhead_s: added to every simulated first token.
        skip: leave out that many of the first requests.
    """
    scores = score(recording)
    measured = [_measured(row) for row in rows]
    simulated_ttft = scores.ttft_s + overhead_s
    calls = recording.workload.calls
    promised = np.isfinite(calls["ttft_s"]) | np.isfinite(calls["tpot_s"]) | np.isfinite(calls["e2e_s"])
    promised[:skip] = False
    kept = scores.completed & scores.tpot_met & scores.e2e_met & (simulated_ttft <= calls["ttft_s"] + 1e-6)
    real_kept = np.array([score.attained for score in measured])
    shares = (float(real_kept[promised].mean()), float(kept[promised].mean())) if promised.any() else (1.0, 1.0)
    return Fidelity(
        requests=len(rows) - skip,
        ttft_ms=_errors(np.array([score.ttft_s for score in measured[skip:]]), simulated_ttft[skip:]),
        tpot_ms=_errors(np.array([score.tpot_s for score in measured[skip:]]), scores.tpot_s[skip:]),
        attainment=shares,
    )


def _measured(row: Row) -> Any:
    targets = StageTarget(
        ttft_s=_number(row.get("ttft_ms"), np.inf) / 1000.0,
        tpot_s=_number(row["tpot_ms"][0] if row["tpot_ms"] else None, np.inf) / 1000.0,
    )
    e2e_s = _number(row.get("e2e_ms"), np.inf) / 1000.0
    return score_request(float(row["sent_s"]), row["token_times_s"], (targets,), e2e_s=e2e_s)


def _number(value: object, missing: float = float("nan")) -> float:
    return float(value) if isinstance(value, int | float) else missing


def _errors(measured_s: NDArray[np.float64], simulated_s: NDArray[np.float64]) -> dict[str, tuple[float, float, float]]:
    known = ~np.isnan(measured_s) & ~np.isnan(simulated_s)
    found = {}
    for quantile in QUANTILES:
        if not known.any():
            continue
        real, virtual = (1000.0 * float(np.quantile(values[known], quantile)) for values in (measured_s, simulated_s))
        found[f"p{100 * quantile:g}"] = (real, virtual, (virtual - real) / real)
    return found
