"""The scenarios of the evaluation as workloads: lengths from shipped tables, long contexts, agents.

A scenario fixes what is asked (lengths, rounds, stages) and what is promised; rate, arrivals and number of requests are
the caller's. Lengths and arrivals draw from separate streams of one seed, so the same requests come at every rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, ClassSet, SLOClass, Stage, single_stage
from slos_serve.core.tasks import TaskPromise, with_task
from slos_serve.workload.agents import COMPOUND, LOOKUP, RESEARCH, USERS, agents, compound, users
from slos_serve.workload.arrivals import arrival_times
from slos_serve.workload.calls import CallArray, Workload, empty_calls
from slos_serve.workload.lengths import length_table
from slos_serve.workload.long_context import continue_turns, first_turns
from slos_serve.workload.prefixes import Prefixes, prefixes_of_blocks, prefixes_of_turns
from slos_serve.workload.trace_files import MOONCAKE_BLOCK_TOKENS, TraceRequest, calls_before, read_trace

TIGHT_TPOT_MS, LOOSE_TPOT_MS = 50.0, 100.0
TIGHT_SLOWDOWN, LOOSE_SLOWDOWN = 3.0, 5.0
MAX_PROMPT_TOKENS = 16_000  # of one call; longer ones are cut, so that every engine can take them in one batch
MAX_THINKING_TOKENS, MAX_ANSWER_TOKENS = 8192, 4096
DEFAULT_ACCEPTANCE = 0.7
MOST_RATE_SCALE = 1e6  # how many times as fast as recorded a trace may be replayed

# Tool calling has no public table of lengths: means as published for ToolBench-like traffic (docs/workloads.md).
TOOL_ROUNDS = (3, 4)
TOOL_FIRST_PROMPT, TOOL_RESULT, TOOL_CALL, TOOL_ANSWER = (2000.0, 0.4), (800.0, 0.8), (100.0, 0.5), (182.0, 0.6)
TOOL_SECONDS = (1.0, 0.8)

SUMMARIZATION = single_stage("summarization", SLO(ttft_slowdown=TIGHT_SLOWDOWN, tpot_ms=LOOSE_TPOT_MS))
CODING = single_stage("coding", SLO(ttft_slowdown=LOOSE_SLOWDOWN, tpot_ms=TIGHT_TPOT_MS))
CHAT = single_stage("chat", SLO(ttft_slowdown=LOOSE_SLOWDOWN, tpot_ms=LOOSE_TPOT_MS))
TOOL_LOOP = single_stage("tool-loop", SLO(ttft_slowdown=TIGHT_SLOWDOWN, tpot_ms=TIGHT_TPOT_MS))
TOOL_FINAL = single_stage("tool-answer", SLO(ttft_slowdown=TIGHT_SLOWDOWN, tpot_ms=LOOSE_TPOT_MS))
REASONING = SLOClass(
    name="reasoning",
    stages=(
        Stage(SLO(ttft_slowdown=TIGHT_SLOWDOWN, tpot_ms=TIGHT_TPOT_MS)),
        Stage(SLO(tpot_ms=LOOSE_TPOT_MS)),
    ),
)

# What JITServe (NSDI 26) promises: answers within 8 s times 1 to 4 beside a chat of 2 s and 100 ms.
INTERACTIVE = single_stage("interactive", SLO(ttft_ms=2000.0, tpot_ms=100.0))
ANSWER_S = 8.0
ANSWERS = tuple(single_stage(f"answer-{n}", SLO(e2e_ms=1000.0 * ANSWER_S * n)) for n in range(1, 5))
BATCH = single_stage("batch", SLO(e2e_ms=600_000.0))
# What QoServe (ASPLOS 26) promises: a tier that is read as it comes, and two that are due as a whole.
TIERS = (
    single_stage("interactive", SLO(ttft_ms=6000.0, tpot_ms=50.0)),
    single_stage("within-600s", SLO(e2e_ms=600_000.0)),
    single_stage("within-1800s", SLO(e2e_ms=1_800_000.0)),
)

LONG_CONTEXT = single_stage("long-context", SLO(ttft_slowdown=LOOSE_SLOWDOWN, tpot_ms=LOOSE_TPOT_MS))

Builder = Callable[[int, Generator], CallArray]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked and promised.

    Attributes:
        classes: ``class_index`` of the calls counts into it.
        build: (requests, randomness) -> their calls, without arrivals.
        arrivals: the process that ``scenario`` arrivals mean.
        share: (calls, randomness) -> which prompts begin alike, where that is more than rounds of a session; changes
            lengths to fit.
    """

    classes: tuple[SLOClass, ...]
    build: Builder
    arrivals: str = "azure-conv"
    share: Callable[[CallArray, Generator], Prefixes] | None = None


def make_workload(
    scenario: str,
    rate_rps: float,
    num_requests: int,
    seed: int = 0,
    arrivals: str = "scenario",
    acceptance: float = DEFAULT_ACCEPTANCE,
) -> Workload:
    """Draw a workload.

    Args:
        scenario: key of :data:`SCENARIOS`.
        rate_rps: requests (sessions) a second.
        num_requests: how many.
        seed: lengths and arrivals depend on it alone.
        arrivals: a process of :mod:`slos_serve.workload.arrivals`, or ``scenario`` for the scenario's own.
        acceptance: probability that a draft token is right.

    Raises:
        InvalidFieldError: unknown scenario or arrivals, or a number out of range.
    """
    chosen = scenario_named(scenario)
    if num_requests < 1:
        raise InvalidFieldError("num_requests", num_requests, "a whole number, 1 or more")
    calls = chosen.build(num_requests, np.random.default_rng((seed, 1)))
    shared = chosen.share(calls, np.random.default_rng((seed, 3))) if chosen.share is not None else None
    process = chosen.arrivals if arrivals == "scenario" else arrivals
    times = arrival_times(process, rate_rps, num_requests, np.random.default_rng((seed, 2)))
    first = np.isfinite(calls["arrival_s"])
    calls["arrival_s"][first] = times
    calls["acceptance"] = acceptance
    return Workload(scenario, chosen.classes, calls, shared)


def scenario_named(name: str) -> Scenario:
    """A scenario.

    Raises:
        InvalidFieldError: no such scenario, with the list of those there are.
    """
    if name not in SCENARIOS:
        raise InvalidFieldError("scenario", name, f"one of {sorted(SCENARIOS)}")
    return SCENARIOS[name]


def from_table(table: str, max_tokens: int, class_index: int = 0) -> Builder:
    """Single calls with lengths of a shipped table."""

    def build(count: int, random: Generator) -> CallArray:
        drawn = length_table(table).draw(count, random)
        return single_calls(drawn["prompt_tokens"], drawn["output_tokens"], max_tokens, class_index)

    return build


def single_calls(
    prompts: NDArray[np.int64], outputs: NDArray[np.int64], max_tokens: int, class_index: int = 0
) -> CallArray:
    """One call a request, lengths cut to what is allowed."""
    calls = empty_calls(len(prompts))
    calls["prompt_tokens"] = np.minimum(prompts, MAX_PROMPT_TOKENS)
    calls["output_tokens"] = calls["first_stage_tokens"] = np.minimum(outputs, max_tokens)
    calls["max_tokens"] = max_tokens
    calls["class_index"] = class_index
    return calls


def _reasoning(count: int, random: Generator) -> CallArray:
    drawn = length_table("reasoning_lengths").draw(count, random)
    thinking = np.minimum(drawn["reasoning_tokens"], MAX_THINKING_TOKENS)
    answer = np.minimum(drawn["answer_tokens"], MAX_ANSWER_TOKENS)
    calls = single_calls(drawn["prompt_tokens"], thinking + answer, MAX_THINKING_TOKENS + MAX_ANSWER_TOKENS)
    calls["first_stage_tokens"] = thinking
    return calls


def _lognormal(random: Generator, mean: float, sigma: float, count: int) -> NDArray[np.float64]:
    return np.asarray(random.lognormal(np.log(mean) - 0.5 * sigma * sigma, sigma, count))


def _tool(count: int, random: Generator) -> CallArray:
    """Rounds of one session follow each other; each prompt holds all that came before and a tool's result."""
    rounds = random.integers(TOOL_ROUNDS[0], TOOL_ROUNDS[1] + 1, count)
    calls = empty_calls(int(rounds.sum()))
    total = len(calls)
    last = np.cumsum(rounds) - 1
    is_last = np.zeros(total, dtype=np.bool_)
    is_last[last] = True
    is_first = np.concatenate((np.ones(1, dtype=np.bool_), is_last[:-1]))
    outputs = np.where(is_last, _lognormal(random, *TOOL_ANSWER, total), _lognormal(random, *TOOL_CALL, total))
    added = np.where(is_first, _lognormal(random, *TOOL_FIRST_PROMPT, total), _lognormal(random, *TOOL_RESULT, total))
    outputs, added = np.clip(np.rint(outputs), 1, 1024), np.clip(np.rint(added), 16, 4000)
    prompt = 0.0
    for i in range(total):
        prompt = added[i] if is_first[i] else prompt + outputs[i - 1] + added[i]
        prompt = min(prompt, MAX_PROMPT_TOKENS)
        calls["prompt_tokens"][i] = prompt
    calls["output_tokens"] = calls["first_stage_tokens"] = outputs
    calls["max_tokens"] = 1024
    calls["class_index"] = is_last
    calls["session"] = np.repeat(np.arange(count), rounds)
    calls["next_call"] = np.where(is_last, -1, np.arange(1, total + 1))
    calls["tool_s"] = np.where(is_first, 0.0, _lognormal(random, *TOOL_SECONDS, total))
    calls["arrival_s"] = np.where(is_first, 0.0, np.inf)
    return calls


def mixed(*parts: Builder) -> Builder:
    """Equal shares of single-call scenarios, each request's kind drawn by itself."""

    def build(count: int, random: Generator) -> CallArray:
        kinds = random.integers(len(parts), size=count)
        calls = empty_calls(count)
        for kind, part in enumerate(parts):
            chosen = np.flatnonzero(kinds == kind)
            calls[chosen] = part(len(chosen), random)
        calls["session"] = np.arange(count)
        return calls

    return build


def _with_deadlines(count: int, random: Generator) -> CallArray:
    """Chats of which every other one has a deadline for its complete answer instead."""
    calls = from_table("azure_conv_lengths", 1024)(count, random)
    calls["class_index"] = np.where(random.random(count) < 0.5, 0, random.integers(1, len(ANSWERS) + 1, count))
    return calls


def _batch_with_deadline(count: int, random: Generator) -> CallArray:
    """Papers to summarize within ten minutes, beside a chat."""
    return mixed(from_table("azure_conv_lengths", 1024, 0), from_table("arxiv_lengths", 2048, 1))(count, random)


def _long_context(count: int, random: Generator) -> CallArray:
    """First turns and their answers; what turns continue is decided by ``share``."""
    calls = empty_calls(count)
    calls["prompt_tokens"], calls["output_tokens"] = first_turns(count, random)
    calls["first_stage_tokens"] = calls["output_tokens"]
    calls["max_tokens"] = MAX_ANSWER_TOKENS
    return calls


SCENARIOS: dict[str, Scenario] = {
    "summarization": Scenario((SUMMARIZATION,), from_table("arxiv_lengths", 2048)),
    "coding": Scenario((CODING,), from_table("azure_code_lengths", 2048), "azure-code"),
    "chat": Scenario((CHAT,), from_table("azure_conv_lengths", 1024)),
    "tool": Scenario((TOOL_LOOP, TOOL_FINAL), _tool, "azure-code"),
    "reasoning": Scenario((REASONING,), _reasoning),
    "mixed": Scenario(
        (SUMMARIZATION, CODING, CHAT),
        mixed(
            from_table("arxiv_lengths", 2048, 0),
            from_table("azure_code_lengths", 2048, 1),
            from_table("azure_conv_lengths", 1024, 2),
        ),
    ),
    "answers": Scenario((INTERACTIVE, *ANSWERS), _with_deadlines),
    "agents": Scenario(
        (INTERACTIVE, *ANSWERS, LOOKUP, RESEARCH), lambda count, random: agents(count, random, len(ANSWERS))
    ),
    "compound": Scenario(
        (INTERACTIVE, *ANSWERS, *COMPOUND), lambda count, random: compound(count, random, len(ANSWERS))
    ),
    "batch-with-deadline": Scenario((CHAT, BATCH), _batch_with_deadline),
    "tiers": Scenario(TIERS, mixed(*(from_table("azure_code_lengths", 2048, tier) for tier in range(len(TIERS))))),
    "users": Scenario(USERS, users),
    "long": Scenario((LONG_CONTEXT,), _long_context, share=continue_turns),
}


def trace_workload(
    path: Path, classes: ClassSet | None = None, rate_scale: float = 1.0, limit: int | None = None
) -> Workload:
    """A recorded trace as a workload.

    Args:
        path: file of a format of :mod:`slos_serve.workload.trace_files`.
        classes: what ``slo_class`` refers to; without it every request is promised what chat is.
        rate_scale: how much faster than recorded it is replayed; pauses between calls of a session stay as they are.
        limit: read at most this many requests.

    Raises:
        InvalidFieldError: broken file, unknown class, or a scale out of range.
    """
    if not 0.0 < rate_scale <= MOST_RATE_SCALE:
        raise InvalidFieldError("rate_scale", rate_scale, f"a number in (0, {MOST_RATE_SCALE:g}]")
    return recorded_workload(read_trace(path, limit), path, classes, rate_scale)


def recorded_workload(
    requests: Sequence[TraceRequest], path: Path, classes: ClassSet | None = None, rate_scale: float = 1.0
) -> Workload:
    """Requests of the trace ``path`` as a workload, see :func:`trace_workload`.

    Raises:
        InvalidFieldError: unknown class.
    """
    chosen = classes if classes is not None else ClassSet({CHAT.name: CHAT}, CHAT.name)
    within_ms = {one.session: one.task_ms for one in reversed(requests) if one.task_ms is not None}
    resolved = [_class_of(request, within_ms.get(request.session), chosen, path) for request in requests]
    names = list(dict.fromkeys(slo_class.name for slo_class in resolved))
    by_name = {slo_class.name: slo_class for slo_class in resolved}
    calls = empty_calls(len(requests))
    calls["arrival_s"] = [request.arrival_s / rate_scale for request in requests]
    calls["prompt_tokens"] = [request.prompt_tokens for request in requests]
    calls["output_tokens"] = calls["first_stage_tokens"] = [request.output_tokens for request in requests]
    calls["max_tokens"] = np.maximum(calls["output_tokens"], 1024)
    calls["class_index"] = [names.index(slo_class.name) for slo_class in resolved]
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        values: Sequence[float | None] = [getattr(request, name) for request in requests]
        calls[f"own_{name}"] = [np.nan if value is None else value for value in values]
    _link(calls, requests)
    return Workload(path.name, tuple(by_name[name] for name in names), calls, _shared_by(requests, calls))


def _link(calls: CallArray, requests: Sequence[TraceRequest]) -> None:
    """Requests that wait for an answer of their session become its next calls."""
    count = 0
    for call, before in enumerate(calls_before(requests)):
        if before < 0:
            calls["session"][call] = count
            count += 1
            continue
        calls["session"][call], calls["next_call"][before] = calls["session"][before], call
        calls["arrival_s"][call], calls["tool_s"][call] = np.inf, (requests[call].pause_ms or 0.0) / 1000.0


def _shared_by(requests: Sequence[TraceRequest], calls: CallArray) -> Prefixes | None:
    """Which prompts of a trace begin alike: by its hashes, or else by its sessions, whose prompts only grow."""
    prompts, outputs = calls["prompt_tokens"], calls["output_tokens"]
    if any(request.block_ids for request in requests):
        return prefixes_of_blocks(prompts, outputs, [request.block_ids for request in requests], MOONCAKE_BLOCK_TOKENS)
    if not any(request.session for request in requests):
        return None
    before = np.full(len(requests), -1, dtype=np.int64)
    last: dict[str, int] = {}
    for call, request in enumerate(requests):
        if request.session:
            before[call] = last.get(request.session, -1)
            last[request.session] = call
    return prefixes_of_turns(prompts, outputs, before)


def _class_of(request: TraceRequest, task_ms: float | None, classes: ClassSet, path: Path) -> SLOClass:
    try:
        found = classes.resolve(request.slo_class)
    except InvalidFieldError as fault:
        raise InvalidFieldError(fault.field, fault.given, fault.allowed, request.where or str(path)) from fault
    slo_class = found if found is not None else single_stage("none", SLO())
    if task_ms is None:
        return slo_class
    told = f"{task_ms:.3f}".rstrip("0").rstrip(".")
    return with_task(replace(slo_class, name=f"{slo_class.name[:40]}-task-{told}ms"), TaskPromise(task_ms))
