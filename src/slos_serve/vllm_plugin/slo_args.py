"""The SLO fields of one request: where they may be given, which one counts, and what is refused.

A request says what it wants in HTTP headers or in ``vllm_xargs`` of the body; a header counts over the body, and both
count over the default of the class. The values come from whoever can reach the server, so every one is bounded here:
numbers by range, strings by length. A ``slo_*`` key of ``vllm_xargs`` that does not exist is refused, because a typo
that changes nothing is worse than an error; other keys belong to others and pass untouched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import MAX_LATENCY_MS, ClassSet, SLOClass, check_number
from slos_serve.core.tasks import check_calls, task_applied, task_of

KEY_PREFIX = "slo_"
SLO_KEYS = (
    "slo_class",
    "slo_ttft_ms",
    "slo_tpot_ms",
    "slo_e2e_ms",
    "slo_due_at",
    "slo_task_ms",
    "slo_task_calls",
    "slo_expected_tokens",
    "slo_last_round",
)
# The tenant as the middleware says it, sealed; a client that sends this key is refused.
TENANT_KEY = "slo_tenant"
# The number of a router's ticket, which the endpoint of many replicas adds; refused from a client too.
TICKET_KEY = "slo_ticket"
# The rank of the promise that the API process told the client, which binds the engine; refused from a client too.
TOLD_KEY = "slo_told"
INNER_KEYS = (TENANT_KEY, TICKET_KEY, TOLD_KEY)
SESSION_KEY = "session_id"  # vLLM's own key, shared with its session affinity
MAX_NAME_CHARS = 63
MAX_SESSION_CHARS = 256
MAX_TENANT_CHARS = 128
MAX_EXPECTED_TOKENS = 10_000_000
MAX_UNIX_S = 1e11

HEADER_KEYS: Mapping[str, str] = {
    "x-slo-class": "slo_class",
    "x-slo-ttft-ms": "slo_ttft_ms",
    "x-llm-d-slo-ttft-ms": "slo_ttft_ms",
    "x-slo-tpot-ms": "slo_tpot_ms",
    "x-llm-d-slo-tpot-ms": "slo_tpot_ms",
    "x-slo-e2e-ms": "slo_e2e_ms",
    "x-slo-due-at": "slo_due_at",
    "x-slo-task-ms": "slo_task_ms",
    "x-slo-task-calls": "slo_task_calls",
    "x-slo-last-round": "slo_last_round",
}
SESSION_HEADER = "x-session-id"
_HEADER_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")
_HEADER_WHOLE = re.compile(r"[0-9]{1,6}")
_HEADER_TIME = re.compile(r"[0-9]{1,11}(\.[0-9]{1,6})?")


@dataclass(frozen=True, slots=True)
class SloArgs:
    """What one request asks for, checked.

    Attributes:
        slo_class: class by name; ``None`` takes the server's default.
        ttft_ms, tpot_ms, e2e_ms: the request's own promises in milliseconds, over those of its class; ``slo_due_at``
            is an ``e2e_ms`` that is given as a time of day, and the earlier of the two counts.
        task_ms: the request's own promise for the whole task, over that of its class.
        task_calls: the client's hint of how many calls the task has.
        expected_tokens: the client's hint of its output length.
        session_id: which conversation or agent loop the request belongs to.
        last_round: no further call of this session follows; its class may name another one for this call.
        tenant: who asks, sealed (:mod:`slos_serve.vllm_plugin.seal`); ``None`` where nobody said.
    """

    slo_class: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    expected_tokens: int | None = None
    session_id: str | None = None
    last_round: bool = False
    tenant: str | None = None
    task_ms: float | None = None
    task_calls: int | None = None

    @property
    def has_numbers(self) -> bool:
        """Whether it brings promises of its own."""
        return any(value is not None for value in (self.ttft_ms, self.tpot_ms, self.e2e_ms, self.task_ms))

    def applied(self, classes: ClassSet) -> SLOClass | None:
        """The class it gets among ``classes``; ``None`` when nothing is promised.

        Raises:
            InvalidFieldError: the class is unknown, or a task is promised and no session says which one.
        """
        found = classes.resolve(
            self.slo_class, self.ttft_ms, self.tpot_ms, e2e_ms=self.e2e_ms, last_round=self.last_round
        )
        named = classes.resolve(self.slo_class) if self.last_round else found
        applied = task_applied(found, named, self.task_ms, self.task_calls)
        if task_of(applied) is not None and self.session_id is None:
            allowed = f"the task of this call (or header x-session-id), 1 to {MAX_SESSION_CHARS} characters"
            raise InvalidFieldError(SESSION_KEY, None, allowed)
        return applied


def from_extra_args(extra_args: Mapping[str, object] | None, arrival_at: float | None = None) -> SloArgs:
    """Read the SLO fields of ``vllm_xargs``, which the scheduler sees as ``sampling_params.extra_args``.

    Args:
        extra_args: fields of the request.
        arrival_at: Unix seconds at which it came, which ``slo_due_at`` counts from; ``None`` for now.

    Raises:
        InvalidFieldError: a ``slo_*`` key is unknown or its value cannot be used.
    """
    if not extra_args:
        return SloArgs()
    unknown = [key for key in extra_args if key.startswith(KEY_PREFIX) and key not in (*SLO_KEYS, *INNER_KEYS)]
    if unknown:
        raise InvalidFieldError(
            "vllm_xargs",
            unknown[0],
            f"one of {list(SLO_KEYS)} among the keys with '{KEY_PREFIX}'",
        )
    return SloArgs(
        slo_class=_text(extra_args, "slo_class", MAX_NAME_CHARS),
        ttft_ms=_milliseconds(extra_args, "slo_ttft_ms"),
        tpot_ms=_milliseconds(extra_args, "slo_tpot_ms"),
        e2e_ms=_complete_answer_ms(extra_args, time.time() if arrival_at is None else arrival_at),
        expected_tokens=_tokens(extra_args, "slo_expected_tokens"),
        session_id=_session(extra_args),
        last_round=_flag(extra_args, "slo_last_round"),
        tenant=_text(extra_args, TENANT_KEY, MAX_TENANT_CHARS),
        task_ms=_milliseconds(extra_args, "slo_task_ms"),
        task_calls=check_calls("slo_task_calls", extra_args.get("slo_task_calls")),
    )


def header_args(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str | float]:
    """The ``vllm_xargs`` that a request's headers stand for; names in lower case, as ASGI has them.

    Raises:
        InvalidFieldError: a value cannot be used, or two headers for one field disagree; names the header.
    """
    found: dict[str, str | float] = {}
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1").lower()
        key = SESSION_KEY if name == SESSION_HEADER else HEADER_KEYS.get(name)
        if key is None:
            continue
        text = raw_value.decode("latin-1").strip()
        value: str | float = text
        if key == "slo_due_at":
            value = header_time(name, text)
        elif key.endswith("_ms"):
            value = header_number(name, text)
        elif key == "slo_task_calls":
            value = header_calls(name, text)
        elif key == "slo_last_round":
            value = header_flag(name, text)
        if found.setdefault(key, value) != value:
            raise InvalidFieldError(name, text, f"one value; another header says {found[key]!r}")
    _text(found, "slo_class", MAX_NAME_CHARS, field="x-slo-class")
    _text(found, SESSION_KEY, MAX_SESSION_CHARS, field=SESSION_HEADER)
    return found


def header_number(name: str, text: str) -> float:
    """A header's milliseconds: digits, with at most one decimal point."""
    if not _HEADER_NUMBER.fullmatch(text):
        raise InvalidFieldError(name, text, f"milliseconds as digits, in (0, {MAX_LATENCY_MS:g}]")
    value = check_number(name, float(text), low=0.0, high=MAX_LATENCY_MS)
    return int(value) if value.is_integer() else value


def header_time(name: str, text: str) -> float:
    """A header's Unix seconds: digits, with at most one decimal point."""
    if not _HEADER_TIME.fullmatch(text):
        raise InvalidFieldError(name, text, "Unix seconds as digits")
    return float(text)


def header_flag(name: str, text: str) -> int:
    """A header's 0 or 1."""
    if text not in ("0", "1"):
        raise InvalidFieldError(name, text, "0 or 1")
    return int(text)


def header_calls(name: str, text: str) -> int:
    """A header's number of calls: digits."""
    value = check_calls(name, int(text) if _HEADER_WHOLE.fullmatch(text) else text)
    assert value is not None
    return value


def _complete_answer_ms(args: Mapping[str, object], arrival_at: float) -> float | None:
    """Milliseconds from arrival to the last token, by whichever of the two fields is the earlier."""
    own_ms = _milliseconds(args, "slo_e2e_ms")
    if "slo_due_at" not in args:
        return own_ms
    due_at = check_number("slo_due_at", args["slo_due_at"], low=0.0, high=MAX_UNIX_S)
    within_ms = 1000.0 * (due_at - arrival_at)
    if not 0.0 < within_ms <= MAX_LATENCY_MS:
        allowed = f"Unix seconds after now ({arrival_at:.0f}), at most {MAX_LATENCY_MS / 1000.0:g} s after it"
        raise InvalidFieldError("slo_due_at", args["slo_due_at"], allowed)
    return within_ms if own_ms is None else min(own_ms, within_ms)


def _text(args: Mapping[str, object], key: str, max_chars: int, field: str | None = None) -> str | None:
    if key not in args:
        return None
    value = args[key]
    if not isinstance(value, str) or not 1 <= len(value) <= max_chars:
        raise InvalidFieldError(field or key, value, f"a string of 1 to {max_chars} characters")
    return value


def _milliseconds(args: Mapping[str, object], key: str) -> float | None:
    return check_number(key, args[key], low=0.0, high=MAX_LATENCY_MS) if key in args else None


def _tokens(args: Mapping[str, object], key: str) -> int | None:
    if key not in args:
        return None
    value = args[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_EXPECTED_TOKENS:
        raise InvalidFieldError(key, value, f"a whole number in [1, {MAX_EXPECTED_TOKENS}]")
    return value


def _flag(args: Mapping[str, object], key: str) -> bool:
    value = args.get(key, False)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise InvalidFieldError(key, value, "0 or 1")
    return bool(value)


def _session(args: Mapping[str, object]) -> str | None:
    """vLLM owns the key, so a value that is no short string is left to vLLM and means no session here."""
    value = args.get(SESSION_KEY)
    return value if isinstance(value, str) and 1 <= len(value) <= MAX_SESSION_CHARS else None
