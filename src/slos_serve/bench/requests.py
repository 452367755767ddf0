"""What the load client sends and what it notes down: plain data, one clock.

Assumes that every ``*_s`` of one run counts from the run's start on one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slos_serve.metrics.summary import Outcome


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request of a workload.

    Attributes:
        request_id: sent as ``X-Request-Id``; unique within a run.
        arrival_s: when it is due to be sent.
        prompt: text; the user's message on the chat endpoint.
        max_tokens: hard cap on the answer.
        slo_class: name of its class, ``None`` for a request without an SLO.
        ttft_ms, tpot_ms, e2e_ms: the request's own numbers, above those of its class.
        phase: part of the run it belongs to ("calm", "burst"); empty when the run has one.
        ignore_eos: ask for exactly ``max_tokens`` (an extension of vLLM and SGLang).
        session: conversation or task that it belongs to.
        task_ms: what its whole task is promised, above its class.
        last_call: no other call of its task follows.
        extra: more fields of its body.
        then: the next call of its task, sent when this answer has ended.
    """

    request_id: str
    arrival_s: float
    prompt: str
    max_tokens: int
    slo_class: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    phase: str = ""
    ignore_eos: bool = False
    session: str | None = None
    task_ms: float | None = None
    last_call: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    then: FollowUp | None = None


@dataclass(frozen=True, slots=True)
class FollowUp:
    """The next call of a task.

    Attributes:
        pause_s: between the end of the answer before and this call.
        request: the call; when it is sent stands in the answer to it.
    """

    pause_s: float
    request: BenchRequest


def num_calls(requests: Iterable[BenchRequest]) -> int:
    """Requests, and those that follow them."""
    count = 0
    for request in requests:
        following: BenchRequest | None = request
        while following is not None:
            count += 1
            following = following.then.request if following.then is not None else None
    return count


@dataclass(slots=True)
class Response:
    """What came back for one request.

    Attributes:
        request: what was sent.
        sent_s: when it was really sent; scoring starts here.
        ended_s: when the answer ended or failed.
        chunk_times_s: when each chunk that carries tokens arrived.
        chunk_tokens: tokens in each of them.
        prompt_tokens, output_tokens: as the server counted them; 0 when it told nothing.
        token_ids: output token ids, when they were asked for.
        outcome: how it ended.
        status: HTTP status, 0 when none was received.
        error: what went wrong, for people.
        finish_reason: the server's.
        class_applied: class that the server says it applied, ``None`` when it says nothing.
        verdict, reason: what the server says it decided of the request, and why; ``None`` when it says nothing.
        retry_after_s: of a rejection.
        text: the answer, when kept.
    """

    request: BenchRequest
    sent_s: float = 0.0
    ended_s: float = 0.0
    chunk_times_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    outcome: Outcome = Outcome.ERROR
    status: int = 0
    error: str = ""
    finish_reason: str | None = None
    class_applied: str | None = None
    verdict: str | None = None
    reason: str | None = None
    retry_after_s: float | None = None
    text: str = ""

    @property
    def token_times_s(self) -> NDArray[np.float64]:
        """float64 [output tokens received], each token at the time of its chunk."""
        return np.repeat(np.asarray(self.chunk_times_s, dtype=np.float64), self.chunk_tokens)

    @property
    def lag_s(self) -> float:
        """How late the client itself was in sending."""
        return self.sent_s - self.request.arrival_s


@dataclass(slots=True)
class LoadResult:
    """A finished run.

    Attributes:
        responses: one for every request, in order of arrival.
        wall_s: from the first scheduled arrival's clock zero to the last answer's end.
        started_unix_s: wall clock at zero.
        stolen: (time, seconds that a hypervisor took from this machine until then, summed over its cores).
    """

    responses: list[Response]
    wall_s: float
    started_unix_s: float
    stolen: list[tuple[float, float]] = field(default_factory=list)

    def then(self, later: LoadResult) -> LoadResult:
        """Both runs as one on this run's clock, the later one right behind."""
        moved = [_moved(response, self.wall_s) for response in later.responses]
        before_s = self.stolen[-1][1] if self.stolen else 0.0
        stolen = [(time_s + self.wall_s, before_s + seconds) for time_s, seconds in later.stolen]
        wall_s = self.wall_s + later.wall_s
        return LoadResult(self.responses + moved, wall_s, self.started_unix_s, self.stolen + stolen)


def _moved(response: Response, by_s: float) -> Response:
    return replace(
        response,
        request=replace(response.request, arrival_s=response.request.arrival_s + by_s),
        sent_s=response.sent_s + by_s,
        ended_s=response.ended_s + by_s,
        chunk_times_s=[time_s + by_s for time_s in response.chunk_times_s],
    )
