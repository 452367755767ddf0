"""What a request would be promised, and what binds: the front desk's own answer, with the numbers it rests on.

The question is asked of the mirror that judges real requests, and counted nowhere. Of a server it is asked through
``GET /slo/explain``; of a load that is only described, on a desk whose engine "publishes" that load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.core.plan import EngineView
from slos_serve.core.request import RequestTable, Status
from slos_serve.core.slo import SLOClass, WhenFull
from slos_serve.core.verdict import SENTENCES, Verdict
from slos_serve.files.profile_file import Profile
from slos_serve.planning.planner import Planner
from slos_serve.routing.publisher import publication_of, snapshot_of
from slos_serve.routing.router import RoutingRequest
from slos_serve.vllm_plugin.api_keys import KeyDigests, bearer_key
from slos_serve.vllm_plugin.asgi import Scope, Send
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.mirror import ENGINE
from slos_serve.vllm_plugin.metrics import EngineLabels
from slos_serve.vllm_plugin.middleware import EXPLAIN_PATH
from slos_serve.vllm_plugin.slo_args import SloArgs, from_extra_args

MOST_TOKENS = 10_000_000
# Clock of a described load: any time will do, all others are relative to it.
LOAD_NOW_S = 1000.0
STEP_AGO_S = 0.03
_QUERY = ("class", "prompt_tokens", "max_tokens", "expected_tokens")


class NothingKnownError(SlosServeError):
    """The server cannot judge requests now: it has no profile, or its engine has not published its state yet."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A verdict and what it rests on; times in milliseconds, ``None`` where nothing is promised or predicted.

    Attributes:
        slo_class: class of the request; ``None`` without a promise.
        verdict, reason, text: as in the answer's headers.
        status: HTTP status of a refusal.
        prompt_tokens: of the request.
        rank: which promise of its class it is given: 0 for the first, then the weaker ones.
        promises: all of them in order, where there are weaker ones: ``ttft_ms``, ``tpot_ms``, ``e2e_ms``.
        target_ttft_ms, predicted_ttft_ms: first token: promised, and expected if the request were taken now.
        target_tpot_ms, predicted_tpot_ms: time per output token, likewise.
        predicted_start_ms: first token of a request that is promised nothing.
        ahead_tokens: prompt tokens to compute until the first token, its own counted; attention counted in.
        prefill_rate: prompt tokens a second beside the promised decodes and this one; negative: those would be late.
        kv_blocks, kv_blocks_left: needed at the forecast peak, and left beside all promises.
        room: requests like this one that fit beside all that is promised, itself counted; 32 at most.
        next_obstacle: what stops the one after those; ``None`` where nothing does.
    """

    slo_class: str | None
    verdict: str
    reason: str
    text: str
    status: int | None
    prompt_tokens: int
    rank: int = 0
    promises: Sequence[Mapping[str, float]] = ()
    target_ttft_ms: float | None = None
    predicted_ttft_ms: float | None = None
    target_tpot_ms: float | None = None
    predicted_tpot_ms: float | None = None
    predicted_start_ms: float | None = None
    ahead_tokens: float | None = None
    prefill_rate: float | None = None
    kv_blocks: float | None = None
    kv_blocks_left: float | None = None
    room: int = 0
    next_obstacle: str | None = None

    @classmethod
    def of_dict(cls, given: Mapping[str, Any]) -> Explained:
        """From a server's answer; fields that this version does not know are left out.

        Raises:
            InvalidFieldError: it is no such answer.
        """
        known = {entry.name for entry in fields(cls)}
        try:
            return cls(**{name: value for name, value in given.items() if name in known})
        except TypeError as fault:
            raise InvalidFieldError("answer", str(fault), f"the answer of {EXPLAIN_PATH}") from None


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that an engine has, described.

    Attributes:
        running: class -> requests that generate: half of their answer is there, and they are on time.
        waiting: class -> requests that came just now and have not begun.
        prompt_tokens, answer_tokens: of each of them.
        max_num_seqs: most requests that run at a time.
    """

    running: Mapping[str, int] = field(default_factory=dict)
    waiting: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 512
    answer_tokens: int = 256
    max_num_seqs: int = 256


def explain(desk: FrontDesk, args: SloArgs, prompt_tokens: int, max_tokens: int | None = None) -> Explained:
    """What the desk would say of a request.

    Raises:
        InvalidFieldError: the class is unknown, or the request is longer than the model's context.
        NothingKnownError: nothing can be judged now.
    """
    _check_length(desk.max_model_len, prompt_tokens, max_tokens)
    slo_class = desk.applied(args)
    found = desk.look(args, prompt_tokens, max_tokens)
    if found is None:
        raise NothingKnownError("nothing can be judged: no profile, or the engine has not published its state yet")
    several, looked = found
    answer, predicted = looked.answer, looked.predicted
    asked, margin_s = several[answer.rank], desk.config.planner.ttft_margin_s
    numbers: dict[str, float | None] = {}
    if predicted is not None:
        numbers = {
            "predicted_ttft_ms": _ms(predicted.ttft_s),
            "predicted_tpot_ms": _ms(predicted.tpot_s),
            "ahead_tokens": round(predicted.ahead_tokens),
            "prefill_rate": round(predicted.prefill_rate),
            "kv_blocks": round(predicted.kv_blocks),
            "kv_blocks_left": round(predicted.kv_blocks_left),
        }
    return Explained(
        slo_class=slo_class.name if slo_class is not None and asked.has_slo else None,
        verdict=answer.verdict.value,
        reason=answer.reason.value,
        text=SENTENCES[answer.reason],
        status=_status(slo_class) if answer.verdict is Verdict.REJECTED else None,
        prompt_tokens=prompt_tokens,
        rank=answer.rank,
        promises=[_promise(one, margin_s) for one in several] if len(several) > 1 else [],
        target_ttft_ms=_ms(asked.ttft_due_s + margin_s - asked.arrival_s),
        target_tpot_ms=_ms(asked.tpot_s),
        predicted_start_ms=_ms(answer.start_s),
        room=looked.room,
        next_obstacle=None if looked.next_obstacle is None else looked.next_obstacle.value,
        **numbers,
    )


def _check_length(most: int, prompt_tokens: int, max_tokens: int | None) -> None:
    """Refuse what the server would refuse: it judges such a request never."""
    answer = 1 if max_tokens is None else max_tokens
    if prompt_tokens + answer > most:
        given = f"{prompt_tokens} and {answer} answer tokens"
        raise InvalidFieldError("prompt_tokens", given, f"at most {most} together, the model's context")


def loaded_desk(config: PluginConfig, load: Load, max_model_len: int) -> FrontDesk:
    """A front desk whose engine has just published ``load``.

    Args:
        config: classes and profile.
        load: what the engine has.
        max_model_len: longest context of the model.

    Raises:
        InvalidFieldError: no profile, an unknown class, or more than the engine holds.
    """
    if config.profile is None:
        raise InvalidFieldError("profile", None, "a batch-time profile")
    desk = FrontDesk(config, EngineLabels("", "0"), max_model_len, clock_s=lambda: LOAD_NOW_S)
    planner = Planner(config.profile.model, len(config.classes) + 2, config.planner)
    view = view_of(config, load, config.profile)
    state = publication_of(planner, config.profile.model, snapshot_of(view, LOAD_NOW_S), replica=ENGINE)
    desk.heard(json.dumps(state.as_dict()).encode("ascii"), is_state=True)
    desk.ready = True
    return desk


def view_of(config: PluginConfig, load: Load, profile: Profile) -> EngineView:
    """The engine of a profile with the requests of a load in it."""
    table = RequestTable()
    running: list[int] = []
    waiting: list[int] = []
    indices = {slo_class.name: index for index, slo_class in enumerate(config.classes)}
    for option, counts in (("--running", load.running), ("--waiting", load.waiting)):
        if unknown := [name for name in counts if name not in indices]:
            raise InvalidFieldError(option, unknown[0], f"a class: one of {sorted(indices)}")
    entered = [(name, count, running) for name, count in load.running.items()]
    entered += [(name, count, waiting) for name, count in load.waiting.items()]
    for name, count, slots in entered:
        slo_class = config.classes.resolve(name, None, None)
        assert slo_class is not None
        for _ in range(count):
            slot = _enter(table, slo_class, indices[name], load, profile, config.planner.ttft_margin_s)
            if slots is running:
                _begin(table, slot, load)
            slots.append(slot)
    total = profile.kv_capacity_tokens // profile.block_size
    used = sum(math.ceil(int(table.rows["computed_tokens"][slot]) / profile.block_size) for slot in running)
    if len(running) > load.max_num_seqs:
        raise InvalidFieldError("--running", len(running), f"at most {load.max_num_seqs} requests (--max-num-seqs)")
    if used > total:
        raise InvalidFieldError(
            "--running", f"requests that hold {used} KV blocks", f"the {total} of the profile's engine"
        )
    return EngineView(
        table=table,
        running=np.array(running, dtype=np.int64),
        waiting=np.array(waiting, dtype=np.int64),
        free_blocks=total - used,
        total_blocks=total,
        block_size=profile.block_size,
        max_num_seqs=load.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
    )


def _enter(
    table: RequestTable, slo_class: SLOClass, index: int, load: Load, profile: Profile, ttft_margin_s: float
) -> int:
    ttft_s = slo_class.slo.ttft_s(profile.model.zero_load_s(load.prompt_tokens))
    return table.add(
        arrival_s=LOAD_NOW_S,
        prompt_tokens=load.prompt_tokens,
        max_tokens=load.answer_tokens,
        ttft_due_s=LOAD_NOW_S + ttft_s - ttft_margin_s,
        tpot_s=slo_class.slo.tpot_s,
        answer_due_s=LOAD_NOW_S + slo_class.slo.e2e_s - ttft_margin_s,
        class_index=index,
        weight=max(slo_class.weight, 1e-6),
        max_stall_s=slo_class.max_stall_ms / 1000.0,
        hint_tokens=load.answer_tokens,
    )


def _begin(table: RequestTable, slot: int, load: Load) -> None:
    """Half of the answer is there; the next token is due now."""
    row = table.rows[slot]
    output = max(load.answer_tokens // 2, 1)
    row["running"] = 1
    row["status"] = Status.ADMITTED if row["has_slo"] else Status.BEST_EFFORT
    row["output_tokens"] = row["stage_tokens"] = output
    row["computed_tokens"] = load.prompt_tokens + output - 1
    paced_s = output * float(row["tpot_s"]) if math.isfinite(row["tpot_s"]) else 0.0
    row["stage_start_s"] = LOAD_NOW_S - paced_s
    row["ttft_due_s"] = min(float(row["ttft_due_s"]), LOAD_NOW_S) - paced_s
    row["arrival_s"] = LOAD_NOW_S - paced_s
    row["last_token_s"] = LOAD_NOW_S - STEP_AGO_S


class ExplainRoute:
    """Answers ``GET /slo/explain?class=NAME&prompt_tokens=N``.

    Args:
        desk: judges the server's requests.
        keys: API keys of the server, one of which a request must bring; empty for none.
    """

    def __init__(self, desk: FrontDesk, keys: Sequence[str] = ()) -> None:
        self._desk = desk
        self._keys = KeyDigests.of(keys) if keys else None

    async def __call__(self, scope: Scope, send: Send) -> None:
        """Answer one request."""
        status, body = self._answer(scope)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode("ascii"))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _answer(self, scope: Scope) -> tuple[int, bytes]:
        if self._keys is not None and not self._keys.accept(bearer_key(scope)):
            return 401, _error("send a key of this server: Authorization: Bearer KEY", None, 401)
        try:
            args, prompt_tokens, max_tokens = query_args(bytes(scope.get("query_string", b"")))
            found = explain(self._desk, args, prompt_tokens, max_tokens)
        except InvalidFieldError as error:
            return 400, _error(str(error), error.field, 400)
        except NothingKnownError as error:
            return 503, _error(str(error), None, 503)
        return 200, json.dumps(asdict(found)).encode("ascii")


def query_args(query: bytes) -> tuple[SloArgs, int, int | None]:
    """Class, prompt tokens and ``max_tokens`` of a query string.

    Raises:
        InvalidFieldError: a key is unknown, or a value cannot be used.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=len(_QUERY))
    except ValueError:
        raise InvalidFieldError("query", query[:40], f"at most one each of {list(_QUERY)}") from None
    given = dict(pairs)
    if unknown := [key for key in given if key not in _QUERY]:
        raise InvalidFieldError("query", unknown[0], f"one of {list(_QUERY)}")
    extra: dict[str, object] = {"slo_class": given["class"]} if "class" in given else {}
    if "expected_tokens" in given:
        extra["slo_expected_tokens"] = _whole(given, "expected_tokens")
    max_tokens = _whole(given, "max_tokens") if "max_tokens" in given else None
    return from_extra_args(extra), _whole(given, "prompt_tokens"), max_tokens


def _whole(given: Mapping[str, str], key: str) -> int:
    text = given.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 8 and 1 <= int(text) <= MOST_TOKENS):
        raise InvalidFieldError(key, text, f"a whole number, 1 to {MOST_TOKENS}")
    return int(text)


def _error(message: str, param: str | None, code: int) -> bytes:
    kind = {400: "invalid_request_error", 401: "authentication_error"}.get(code, "service_unavailable")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode("ascii")


def _promise(asked: RoutingRequest, margin_s: float) -> dict[str, float]:
    """What a request asks for in milliseconds."""
    promised = {
        "ttft_ms": _ms(asked.ttft_due_s + margin_s - asked.arrival_s),
        "tpot_ms": _ms(asked.tpot_s),
        "e2e_ms": _ms(asked.answer_due_s + margin_s - asked.arrival_s),
    }
    return {name: value for name, value in promised.items() if value is not None}


def _status(slo_class: SLOClass | None) -> int:
    return 503 if slo_class is not None and slo_class.when_full is WhenFull.REJECT_503 else 429


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1e3, 1)
