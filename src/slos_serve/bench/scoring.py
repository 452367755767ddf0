"""Holds the answers of a run against the classes: who attained.

A slowdown TTFT needs the zero-load time of the prompt, which comes from a batch-time model and the prompt's token count
as the server reports it; without a model only absolute promises can be scored, and that is said before anything is
sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from slos_serve.bench.requests import BenchRequest, Response
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import NO_SLO_CLASS, ClassSet, SLOClass
from slos_serve.core.tasks import task_applied, task_of
from slos_serve.metrics.attainment import StageTarget, score_request, stage_starts_of, targets_of
from slos_serve.metrics.summary import Outcome, ScoredRequest
from slos_serve.perf.batch_time import BatchTimeModel


def class_of(request: BenchRequest, classes: ClassSet) -> SLOClass | None:
    """The class a request is held to, its own numbers applied; ``None`` when nothing is promised.

    Raises:
        InvalidFieldError: its class is unknown.
    """
    named = classes.resolve(request.slo_class, request.ttft_ms, request.tpot_ms, e2e_ms=request.e2e_ms)
    found = task_applied(named, named, request.task_ms, None)
    return None if found is None or found.best_effort else found


def check_scorable(requests: Iterable[BenchRequest], classes: ClassSet, model: BatchTimeModel | None) -> None:
    """Refuse, before sending, what could not be scored afterwards.

    Raises:
        InvalidFieldError: an unknown class, or a slowdown TTFT without a batch-time model.
    """
    asked = {(request.slo_class, request.ttft_ms, request.tpot_ms, request.e2e_ms): request for request in requests}
    for request in asked.values():
        found = class_of(request, classes)
        if model is None and found is not None and found.slo.ttft_ms is None and found.slo.ttft_slowdown is not None:
            raise InvalidFieldError(
                f"classes.{found.name}.ttft_slowdown",
                found.slo.ttft_slowdown,
                "ttft_ms, or a profile of the server's engine to scale from (--profile FILE)",
                "class file",
            )


def ends_by_token(classes: ClassSet) -> bool:
    """True when scoring needs output token ids."""
    return any(stage.end_token_id is not None for slo_class in classes for stage in slo_class.stages)


def targets_for(response: Response, classes: ClassSet, model: BatchTimeModel | None) -> tuple[StageTarget, ...]:
    """What a request is held to, its slowdown resolved by the prompt's length."""
    zero_load_s = math.nan if model is None else model.zero_load_s(response.prompt_tokens)
    return targets_of(class_of(response.request, classes), zero_load_s)


def score_response(response: Response, classes: ClassSet, model: BatchTimeModel | None) -> ScoredRequest:
    """Score one answer; what came of a failed one still counts for stalls and tokens."""
    slo_class = class_of(response.request, classes)
    times = response.token_times_s
    starts = stage_starts_of(slo_class.stages, len(times), response.token_ids or None) if slo_class else [0]
    targets, e2e_s = targets_for(response, classes, model), slo_class.slo.e2e_s if slo_class else math.inf
    score = score_request(response.sent_s, times, targets, starts, e2e_s)
    if response.outcome is Outcome.COMPLETED and slo_class is not None and response.prompt_tokens == 0:
        _require_prompt_tokens(slo_class)
    return ScoredRequest(
        slo_class=response.request.slo_class or (slo_class.name if slo_class else NO_SLO_CLASS),
        has_slo=slo_class is not None,
        outcome=response.outcome,
        score=score,
        gaps_s=np.diff(times),
    )


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How a whole task fared.

    Attributes:
        slo_class: name of the class of its first call.
        calls: how many were sent.
        spent_s: until its last answer ended, of what counts.
        kept: all its calls were answered, the last one in time.
    """

    slo_class: str
    calls: int
    spent_s: float
    kept: bool


def score_tasks(responses: Sequence[Response], classes: ClassSet) -> dict[str, TaskScore]:
    """Every task of a run by its session; the client knows which call is the last one."""
    by_session: dict[str, list[Response]] = {}
    for response in sorted(responses, key=lambda response: response.sent_s):
        if response.request.session is not None and task_of(class_of(response.request, classes)) is not None:
            by_session.setdefault(response.request.session, []).append(response)
    found = {}
    for session, calls in by_session.items():
        slo_class = class_of(calls[0].request, classes)
        task = task_of(slo_class)
        assert slo_class is not None and task is not None
        ends_s = [response.chunk_times_s[-1] if response.chunk_times_s else response.ended_s for response in calls]
        spent_s = ends_s[-1] - calls[0].sent_s
        if not task.pauses_count:
            spent_s = sum(end_s - response.sent_s for end_s, response in zip(ends_s, calls, strict=True))
        whole = calls[-1].request.then is None and all(one.outcome is Outcome.COMPLETED for one in calls)
        found[session] = TaskScore(slo_class.name, len(calls), spent_s, whole and spent_s <= task.task_s)
    return found


def score_responses(
    responses: Sequence[Response], classes: ClassSet, model: BatchTimeModel | None
) -> list[ScoredRequest]:
    """Score every answer of a run, in order."""
    return [score_response(response, classes, model) for response in responses]


def _require_prompt_tokens(slo_class: SLOClass) -> None:
    if slo_class.slo.ttft_ms is None and slo_class.slo.ttft_slowdown is not None:
        raise InvalidFieldError(
            "usage.prompt_tokens",
            None,
            f"a count from the server, which the slowdown TTFT of class '{slo_class.name}' scales with; "
            "give that class a ttft_ms instead",
        )
