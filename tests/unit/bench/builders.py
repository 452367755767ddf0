"""Short ways to make requests, responses and demo sides for tests of the bench package."""

from __future__ import annotations

from dataclasses import replace

from slos_serve.bench.demo_events import SchedulerEvents
from slos_serve.bench.demo_plan import DemoPlan, DemoSettings, plan_demo
from slos_serve.bench.demo_report import SideRun, side_run
from slos_serve.bench.requests import BenchRequest, LoadResult, Response
from slos_serve.metrics.summary import Outcome
from slos_serve.perf.batch_time import BatchTimeModel

# 2 ms a token, 6 ms a request, 20 ms a step: about what a small model does on two cores.
MODEL = BatchTimeModel(k_c_s=0.002, b_c_s=0.02, k_m_s=0.0, b_m_s=0.02, k_seq_s=0.006)


def response_of(
    request: BenchRequest,
    ttft_s: float = 0.1,
    gap_s: float = 0.01,
    tokens: int = 10,
    outcome: Outcome = Outcome.COMPLETED,
    prompt_tokens: int = 100,
) -> Response:
    """An answer of evenly spaced tokens, sent exactly when due."""
    sent_s = request.arrival_s
    times = [sent_s + ttft_s + k * gap_s for k in range(tokens)]
    return Response(
        request=request,
        sent_s=sent_s,
        ended_s=times[-1] if times else sent_s,
        chunk_times_s=times,
        chunk_tokens=[1] * tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=tokens,
        outcome=outcome,
        status=200 if outcome is Outcome.COMPLETED else 429,
        class_applied=request.slo_class,
        error="" if outcome is Outcome.COMPLETED else "too busy",
    )


def load_of(responses: list[Response]) -> LoadResult:
    """A run that ended with its last answer."""
    return LoadResult(responses, max((response.ended_s for response in responses), default=1.0), 1_700_000_000.0)


def small_plan(seed: int = 0) -> DemoPlan:
    """A demo of a few seconds."""
    return plan_demo(MODEL, DemoSettings(seed=seed, calm_s=20.0, burst_s=15.0))


def demo_side(plan: DemoPlan, *, slow_from: int, events: SchedulerEvents | None = None) -> SideRun:
    """A side whose burst requests miss their TPOT from the ``slow_from``-th on."""
    calm = [response_of(request) for request in plan.calm]
    burst = [response_of(request, gap_s=0.01 if index < slow_from else 5.0) for index, request in enumerate(plan.burst)]
    return side_run({"calm": load_of(calm), "burst": load_of(burst)}, plan, MODEL, events)


def calls_of(first: BenchRequest) -> list[BenchRequest]:
    """A request and those that follow it."""
    found = [first]
    while found[-1].then is not None:
        found.append(found[-1].then.request)
    return found


def answered(first: BenchRequest, call_s: float) -> list[Response]:
    """All calls of a request answered, each after ``call_s``, the pauses between them kept."""
    found, at_s = [], first.arrival_s
    for call in calls_of(first):
        sent = replace(call, arrival_s=at_s)
        found.append(response_of(sent, ttft_s=call_s / 2, gap_s=call_s / 2 / 9))
        at_s += call_s + (call.then.pause_s if call.then is not None else 0.0)
    return found


def agents_side(given: DemoPlan, slow_from: int) -> dict[str, LoadResult]:
    """All calm requests in time; of the burst those before the ``slow_from``-th."""
    calm = [response for request in given.calm for response in answered(request, 0.1)]
    burst = [
        response
        for number, request in enumerate(given.burst)
        for response in answered(request, 0.1 if number < slow_from else 60.0)
    ]
    return {"calm": load_of(calm), "burst": load_of(burst)}
