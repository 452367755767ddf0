"""Reads recorded traffic: Azure LLM inference CSV, Mooncake JSONL, BurstGPT CSV.

Decides what each file's columns mean and names the line of anything it cannot use. Extra columns or keys ``slo_class``,
``ttft_ms``, ``tpot_ms`` and ``e2e_ms`` give a request its own promise. With ``pause_ms`` a request is the next call of
its session: it comes so long after the answer before it has ended, and its stamp says only in which order. ``task_ms``
promises the whole of such a session. Times are seconds since the first request of the file.
Mooncake stamps come in ticks of three seconds; requests of one tick are spread over it by their position, so that the
same file always gives the same arrivals.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import MAX_LATENCY_MS, check_number

MOONCAKE_TICK_S = 3.0
MOONCAKE_BLOCK_TOKENS = 512
MAX_TOKENS_A_REQUEST = 10_000_000
# The public files call these columns so; other spellings are refused rather than guessed.
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One recorded request.

    Attributes:
        arrival_s: seconds since the first request of the file.
        prompt_tokens, output_tokens: lengths, both 1 or more.
        slo_class: class named by the file, if any.
        ttft_ms, tpot_ms, e2e_ms: promises given by the file, if any.
        session: conversation it belongs to, if the file says so.
        pause_ms: between the end of its session's answer before and this request; ``None`` when it comes at its stamp.
        task_ms: promise of the whole session, if any.
        block_ids: hash of each block of :data:`MOONCAKE_BLOCK_TOKENS` prompt tokens and all before it (Mooncake): equal
            ids mean equal beginnings.
        where: file and line, for errors that show only beside other requests.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo_class: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    session: str | None = None
    pause_ms: float | None = None
    task_ms: float | None = None
    block_ids: tuple[int, ...] = ()
    where: str | None = field(default=None, compare=False)


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """Requests of a trace file in order of arrival; the format is told by its first line.

    Args:
        path: CSV (Azure, BurstGPT) or JSONL (Mooncake).
        limit: read at most this many requests.

    Raises:
        InvalidFieldError: no such file, unknown format, no requests, or a broken line (named by file and line).
    """
    if not path.is_file():
        raise InvalidFieldError("trace", str(path), "an existing file")
    reader = _reader_of(path)
    requests: list[TraceRequest] = []
    try:
        for request in reader(path):
            requests.append(request)
            if limit is not None and len(requests) >= limit:
                break
    except UnicodeDecodeError as fault:
        raise InvalidFieldError("trace", str(path), f"UTF-8 text ({fault.reason} at byte {fault.start})") from fault
    if not requests:
        raise InvalidFieldError("trace", str(path), "a file with at least one request")
    requests.sort(key=lambda request: request.arrival_s)
    first_s = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - first_s) for request in requests]


def _reader_of(path: Path) -> Callable[[Path], Iterator[TraceRequest]]:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        head = lines.readline().strip()
    if head.startswith("{"):
        return _read_mooncake
    try:
        columns = [name.strip() for name in next(csv.reader([head]), [])]
    except csv.Error:
        columns = []
    if all(name in columns for name in AZURE_COLUMNS):
        return lambda file: _read_csv(file, AZURE_COLUMNS, _azure_seconds)
    if all(name in columns for name in BURSTGPT_COLUMNS):
        return lambda file: _read_csv(file, BURSTGPT_COLUMNS, _plain_seconds)
    formats = f"a header with {','.join(AZURE_COLUMNS)} or {','.join(BURSTGPT_COLUMNS)}, or JSON lines"
    raise InvalidFieldError("trace header", head, formats, f"{path}:1")


def _read_csv(
    path: Path, names: tuple[str, str, str], seconds_of: Callable[[str, str], float]
) -> Iterator[TraceRequest]:
    stamp, prompt, output = names
    for fields, where in _csv_rows(path):
        output_tokens = _count(output, fields.get(output), where, least=0)
        if output_tokens == 0:
            continue  # a failed request of the recorded service; it generated nothing
        request = TraceRequest(
            arrival_s=seconds_of(fields.get(stamp, ""), where),
            prompt_tokens=_count(prompt, fields.get(prompt), where, least=1),
            output_tokens=output_tokens,
            session=fields.get("Session ID") or fields.get("session") or None,
            where=where,
        )
        yield _with_promise(request, fields, where)


def _csv_rows(path: Path) -> Iterator[tuple[dict[str, str], str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                fields = {key.strip(): value for key, value in row.items() if key is not None and value is not None}
                yield fields, f"{path}:{rows.line_num}"
        except csv.Error as fault:
            raise InvalidFieldError("line", "", f"a line of CSV ({fault})", f"{path}:{rows.reader.line_num}") from fault


def _read_mooncake(path: Path) -> Iterator[TraceRequest]:
    rows = list(_json_rows(path))
    in_tick: dict[float, int] = {}
    for _, row, where in rows:
        stamp = _plain_seconds(row.get("timestamp"), where) / 1000.0
        in_tick[stamp] = in_tick.get(stamp, 0) + 1
    ticked = len(rows) > 1 and all((1000 * stamp) % (1000 * MOONCAKE_TICK_S) == 0 for stamp in in_tick)
    position: dict[float, int] = {}
    for _, row, where in rows:
        stamp = _plain_seconds(row.get("timestamp"), where) / 1000.0
        place = position.get(stamp, 0)
        position[stamp] = place + 1
        prompt_tokens = _count("input_length", row.get("input_length"), where, least=1)
        spread_s = MOONCAKE_TICK_S * (place + 0.5) / in_tick[stamp] if ticked else 0.0
        request = TraceRequest(
            arrival_s=stamp + spread_s,
            prompt_tokens=prompt_tokens,
            output_tokens=_count("output_length", row.get("output_length"), where, least=1),
            session=None if row.get("session_id") in (None, "") else str(row["session_id"]),
            block_ids=_block_ids(row.get("hash_ids"), where),
            where=where,
        )
        yield _with_promise(request, row, where)


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object], str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as fault:  # no JSON, a number of thousands of digits, endless nesting
                why = fault.msg if isinstance(fault, json.JSONDecodeError) else str(fault)
                raise InvalidFieldError("line", line.strip(), f"a JSON object ({why})", where) from fault
            if not isinstance(row, dict):
                raise InvalidFieldError("line", row, "a JSON object", where)
            for key in MOONCAKE_KEYS:
                if key not in row:
                    raise InvalidFieldError(key, None, "a value in every line", where)
            yield number, row, where


def _block_ids(hash_ids: object, where: str) -> tuple[int, ...]:
    if hash_ids is None:
        return ()
    if not isinstance(hash_ids, list) or not all(isinstance(item, int) for item in hash_ids):
        raise InvalidFieldError("hash_ids", hash_ids, "a list of whole numbers", where)
    return tuple(hash_ids)


def _with_promise(request: TraceRequest, fields: Mapping[str, object], where: str) -> TraceRequest:
    """The request with what the optional columns give."""
    slo_class = fields.get("slo_class")
    found = replace(
        request,
        slo_class=None if slo_class in (None, "") else str(slo_class),
        ttft_ms=_latency("ttft_ms", fields, where),
        tpot_ms=_latency("tpot_ms", fields, where),
        e2e_ms=_latency("e2e_ms", fields, where),
        pause_ms=_latency("pause_ms", fields, where, zero=True),
        task_ms=_latency("task_ms", fields, where),
    )
    for name in ("pause_ms", "task_ms"):
        if getattr(found, name) is not None and not found.session:
            raise InvalidFieldError(name, getattr(found, name), "only beside a session", where)
    return found


def _latency(name: str, fields: Mapping[str, object], where: str, *, zero: bool = False) -> float | None:
    value = fields.get(name)
    if value is None or value == "":
        return None
    number = _plain_seconds(value, where, name)
    return check_number(name, number, low=0.0, high=MAX_LATENCY_MS, low_included=zero, where=where)


def calls_before(requests: Sequence[TraceRequest]) -> list[int]:
    """For each request the one whose answer it waits for, -1 for those that come at their stamp.

    Args:
        requests: in order of arrival.

    Raises:
        InvalidFieldError: a request waits for an answer, and it is the first of its session.
    """
    last: dict[str, int] = {}
    before = []
    for index, request in enumerate(requests):
        waits_for = -1 if request.pause_ms is None else last.get(request.session or "", -1)
        if request.pause_ms is not None and waits_for < 0:
            allowed = f"a request before it in session {request.session!r}"
            raise InvalidFieldError("pause_ms", request.pause_ms, allowed, request.where)
        before.append(waits_for)
        if request.session:
            last[request.session] = index
    return before


def _count(name: str, value: object, where: str, least: int) -> int:
    allowed = f"a whole number from {least} to {MAX_TOKENS_A_REQUEST}"
    try:
        number = int(str(value).strip())
    except ValueError as fault:
        raise InvalidFieldError(name, value, allowed, where) from fault
    if not least <= number <= MAX_TOKENS_A_REQUEST:
        raise InvalidFieldError(name, value, allowed, where)
    return number


def _azure_seconds(value: str, where: str) -> float:
    """Azure stamps have seven fraction digits, one more than ``datetime`` reads; some rows carry an offset."""
    text = value.strip()
    whole, _, fraction = text.partition(".")
    digits, offset = fraction, ""
    for mark in ("+", "Z", "-"):
        before, found, after = fraction.partition(mark)
        if found:
            digits, offset = before, found + after
            break
    try:
        stamp = datetime.fromisoformat(whole + offset.replace("Z", "+00:00"))
        part = int(digits) / 10 ** len(digits) if digits else 0.0
    except ValueError as fault:
        raise InvalidFieldError("TIMESTAMP", value, "YYYY-MM-DD HH:MM:SS.fffffff", where) from fault
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=UTC)
    return stamp.timestamp() + part


def _plain_seconds(value: object, where: str, name: str = "timestamp") -> float:
    try:
        number = float(str(value).strip())
    except ValueError as fault:
        raise InvalidFieldError(name, value, "a number, 0 or more", where) from fault
    return check_number(name, number, low=0.0, high=1e12, low_included=True, where=where)
