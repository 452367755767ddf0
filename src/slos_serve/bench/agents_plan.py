"""What the demo's story of agents sends: tasks that call tools, JSON answers and a chat, scaled from the profile.

A chat is read as it comes (first token and pace), a JSON answer is needed whole, of a task only its end counts. Answers
and tasks are due after ``STRETCH`` times what they take at the pace of a loaded engine, the shortest that is planned
for answers (``planning/deadlines.py``); tools' pauses are added. A task's next call comes a pause after the answer
before, and its prompt begins like the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import yaml
from numpy.random import Generator

from slos_serve.bench.demo_plan import (
    TEMPLATE_TOKENS,
    DemoPlan,
    DemoSettings,
    Kind,
    decode_step_s,
    fluid_rate,
    in_turns,
)
from slos_serve.bench.prompts import chat_question, document_to_summarise
from slos_serve.bench.requests import BenchRequest, FollowUp
from slos_serve.bench.workloads import Lengths, WorkloadPart, arrival_times
from slos_serve.core.slo import SLO, ClassSet, SLOClass, single_stage
from slos_serve.core.tasks import TaskPromise, task_of, with_task
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.deadlines import SHORTEST_STEP

CHAT, ANSWER, TASK = "chat", "answer", "task"
CHAT_SHARE, ANSWER_SHARE = 0.34, 0.33  # the rest are tasks
STRETCH = 1.15
CHAT_TPOT_STEPS, CHAT_SLOWDOWN, FLOOR_STEPS = 3.0, 5.0, 8.0
# Length of the steps that the capacity is computed with, in decode steps: as in the story of streams.
CAPACITY_STEPS = 1.8
TASK_CALLS = (3, 5)
CALL_TOKENS, LAST_TOKENS, ANSWER_TOKENS, CHAT_TOKENS = 10, 24, 24, 40
FIRST_WORDS, RESULT_WORDS = Lengths(70, 0.3, 45, 120), Lengths(35, 0.4, 20, 70)
PAUSE_S = (0.6, 0.5)
_TOKENS_PER_WORD = 1.25
_SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 24},
        "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
    },
    "required": ["title", "year"],
    "additionalProperties": False,
}
_JSON: Mapping[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "entry", "schema": _SCHEMA, "strict": True}}
}
_CALLS = sum(TASK_CALLS) / 2.0


def agent_kinds() -> list[Kind]:
    """The mix by calls, for the engine's capacity: a task's first call, its others, answers and chats."""
    tasks = 1.0 - CHAT_SHARE - ANSWER_SHARE
    later = Lengths(FIRST_WORDS.median + RESULT_WORDS.median * _CALLS / 2.0, 0, 1, 4000)
    one = Lengths(1, 0, 1, 1)

    def kind(words: Lengths, tokens: int, share: float) -> Kind:
        part = WorkloadPart(None, chat_question, words, replace(one, median=tokens, low=tokens, high=tokens), share)
        return Kind(part, _TOKENS_PER_WORD, None, None)

    return [
        kind(FIRST_WORDS, CHAT_TOKENS, CHAT_SHARE),
        kind(FIRST_WORDS, ANSWER_TOKENS, ANSWER_SHARE),
        kind(FIRST_WORDS, CALL_TOKENS, tasks),
        kind(later, CALL_TOKENS, tasks * (_CALLS - 2.0)),
        kind(later, LAST_TOKENS, tasks),
    ]


def agent_classes(model: BatchTimeModel, step_s: float) -> ClassSet:
    """What is promised on an engine with this decode step."""
    prompt_s = model.zero_load_s(round(TEMPLATE_TOKENS + _TOKENS_PER_WORD * FIRST_WORDS.median))
    pace_s = SHORTEST_STEP * model.zero_load_s(1)
    answer_s = STRETCH * (prompt_s + ANSWER_TOKENS * pace_s)
    tokens = CALL_TOKENS * (_CALLS - 1.0) + LAST_TOKENS
    task_s = STRETCH * (_CALLS * prompt_s + tokens * pace_s) + PAUSE_S[0] * (_CALLS - 1.0)
    chat = SLO(
        ttft_slowdown=CHAT_SLOWDOWN,
        ttft_floor_ms=round(1000.0 * FLOOR_STEPS * step_s, 1),
        tpot_ms=round(1000.0 * CHAT_TPOT_STEPS * step_s, 1),
    )
    classes: list[SLOClass] = [
        single_stage(CHAT, chat),
        single_stage(ANSWER, SLO(e2e_ms=round(1000.0 * answer_s))),
        with_task(single_stage(TASK, SLO()), TaskPromise(float(round(1000.0 * task_s)))),
    ]
    return ClassSet({one.name: one for one in classes})


def agents_yaml(classes: ClassSet) -> str:
    """The class file of the story."""
    rows: dict[str, dict[str, float]] = {}
    for one in classes:
        task = task_of(one)
        found = {
            "ttft_slowdown": one.slo.ttft_slowdown,
            "ttft_floor_ms": one.slo.ttft_floor_ms if one.slo.ttft_slowdown else None,
            "tpot_ms": one.slo.tpot_ms,
            "e2e_ms": one.slo.e2e_ms,
            "task_ms": None if task is None else task.task_ms,
        }
        rows[one.name] = {key: value for key, value in found.items() if value is not None}
    return yaml.safe_dump({"classes": rows}, sort_keys=False)


def plan_agents(model: BatchTimeModel, settings: DemoSettings) -> DemoPlan:
    """Scale the story to an engine."""
    step_s = decode_step_s(model, settings.decode_batch)
    classes = agent_classes(model, step_s)
    capacity = fluid_rate(model, CAPACITY_STEPS * step_s, agent_kinds())
    rng = np.random.default_rng(settings.seed)
    warm_up = [_request(rng, kind, float(n), "warm", n) for n, kind in enumerate((CHAT, ANSWER, TASK, TASK))]
    calm_s = arrival_times(rng, settings.calm_load * capacity, settings.calm_s, cv=0.5)
    burst_s = arrival_times(rng, settings.burst_load * capacity, settings.burst_s)
    calm = [_request(rng, _drawn_kind(rng), float(at_s), "calm", n) for n, at_s in enumerate(calm_s)]
    burst = [_request(rng, _drawn_kind(rng), float(at_s), "burst", n) for n, at_s in enumerate(burst_s)]
    return DemoPlan(settings, classes, capacity, step_s, warm_up, in_turns(calm, settings), burst)


def _drawn_kind(rng: Generator) -> str:
    drawn = rng.random()
    return CHAT if drawn < CHAT_SHARE else ANSWER if drawn < CHAT_SHARE + ANSWER_SHARE else TASK


def _request(rng: Generator, kind: str, at_s: float, phase: str, number: int) -> BenchRequest:
    name = f"{phase}-{number:05d}"
    if kind == TASK:
        return _task(rng, at_s, phase, name)
    words = FIRST_WORDS.draw(rng)
    if kind == CHAT:
        prompt = chat_question(rng, words)
        return BenchRequest(name, at_s, prompt, CHAT_TOKENS, CHAT, phase=phase, ignore_eos=True)
    prompt = f"{document_to_summarise(rng, words)}\n\nWrite a catalogue entry of it as JSON: title and year."
    return BenchRequest(name, at_s, prompt, ANSWER_TOKENS, ANSWER, phase=phase, extra=_JSON)


def _task(rng: Generator, at_s: float, phase: str, name: str) -> BenchRequest:
    """The first call of a task, the others behind it."""
    count = int(rng.integers(TASK_CALLS[0], TASK_CALLS[1] + 1))
    prompts = [f"{chat_question(rng, FIRST_WORDS.draw(rng))} Use the search tool, one call at a time."]
    for position in range(1, count):
        result = document_to_summarise(rng, RESULT_WORDS.draw(rng)).split("\n\n")[0]
        prompts.append(f"{prompts[-1]}\n\nResult of call {position}: {result}")
    mean_s, sigma = PAUSE_S
    pauses_s = rng.lognormal(np.log(mean_s) - 0.5 * sigma * sigma, sigma, count)
    following: FollowUp | None = None
    for position in reversed(range(count)):
        last = position == count - 1
        request = BenchRequest(
            request_id=f"{name}-{position}",
            arrival_s=at_s,
            prompt=prompts[position],
            max_tokens=LAST_TOKENS if last else CALL_TOKENS,
            slo_class=TASK,
            phase=phase,
            ignore_eos=True,
            session=name,
            last_call=last,
            then=following,
        )
        following = FollowUp(float(pauses_s[position]), request)
    assert following is not None
    return following.request
