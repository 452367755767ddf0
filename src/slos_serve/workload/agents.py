"""Agents' tasks beside chats and answers with deadlines: the mix that JITServe (NSDI 26) promises for.

A third of the requests each: a chat that is read as it comes (2 s and 100 ms), an answer that is due as a whole within
8 s times 1 to 4, and a task of several calls. A task's next call comes a tool's pause after the answer before, and its
prompt holds all that came before. Tasks are promised about 10 s a call and their pauses: few calls within 60 s, many
within 150 s. Nobody is told how many calls a task has. :func:`compound` has JITServe's own tasks instead: 2 to 6 calls,
promised 8 s a call, pauses included. :func:`users` are what AA-AgentPerf counts: agents of 7 to 20 calls, of whom each
wants every answer at a speed of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from slos_serve.core.slo import SLO, single_stage
from slos_serve.core.tasks import TaskPromise, with_task
from slos_serve.workload.calls import CallArray, empty_calls
from slos_serve.workload.lengths import length_table

LOOKUP = with_task(single_stage("lookup", SLO()), TaskPromise(60_000.0))
RESEARCH = with_task(single_stage("research", SLO()), TaskPromise(150_000.0))
LOOKUP_CALLS, RESEARCH_CALLS = (3, 6), (7, 20)
COMPOUND_CALLS, COMPOUND_CALL_MS = (2, 6), 8000.0
COMPOUND = tuple(
    with_task(single_stage(f"compound-{n}", SLO()), TaskPromise(n * COMPOUND_CALL_MS))
    for n in range(COMPOUND_CALLS[0], COMPOUND_CALLS[1] + 1)
)
# Tokens a second that a user is to have, and when every answer is to begin (AA-AgentPerf). Its third speed, 300, is
# beyond the engines whose profiles are shipped.
USER_SPEEDS, USER_TTFT_MS = (30.0, 100.0), 15_000.0
USERS = tuple(
    single_stage(f"user-{speed:g}", SLO(ttft_ms=USER_TTFT_MS, tpot_ms=1000.0 / speed)) for speed in USER_SPEEDS
)
MAX_PROMPT_TOKENS, MAX_TOKENS = 16_000, 1024
# Mean and sigma of log-normal lengths in tokens, and of the tools' seconds.
FIRST_PROMPT, RESULT, CALL, ANSWER = (1500.0, 0.4), (300.0, 0.8), (80.0, 0.6), (250.0, 0.6)
PAUSE_S = (1.5, 0.8)


def agents(count: int, random: Generator, num_answers: int) -> CallArray:
    """Calls of ``count`` requests. Classes: the chat, ``num_answers`` answers, the short tasks, the long ones."""
    kinds = random.integers(0, 3, count)
    long = random.random(count) < 0.5
    rounds = np.where(
        long,
        random.integers(RESEARCH_CALLS[0], RESEARCH_CALLS[1] + 1, count),
        random.integers(LOOKUP_CALLS[0], LOOKUP_CALLS[1] + 1, count),
    )
    rounds = np.where(kinds == 2, rounds, 1)
    return _calls_of(kinds, rounds, num_answers + 1 + long, random, num_answers)


def compound(count: int, random: Generator, num_answers: int) -> CallArray:
    """As :func:`agents`, with a class for each number of calls that a task may have (:data:`COMPOUND`)."""
    kinds = random.integers(0, 3, count)
    rounds = np.where(kinds == 2, random.integers(COMPOUND_CALLS[0], COMPOUND_CALLS[1] + 1, count), 1)
    return _calls_of(kinds, rounds, num_answers + 1 + rounds - COMPOUND_CALLS[0], random, num_answers)


def users(count: int, random: Generator) -> CallArray:
    """Calls of ``count`` agents, each speed as likely as the other (:data:`USERS`)."""
    rounds = random.integers(RESEARCH_CALLS[0], RESEARCH_CALLS[1] + 1, count)
    return _calls_of(np.full(count, 2), rounds, random.integers(0, len(USERS), count), random, 1)


def _calls_of(
    kinds: NDArray[np.int64],
    rounds: NDArray[np.int64],
    task_class: NDArray[np.int64],
    random: Generator,
    num_answers: int,
) -> CallArray:
    """Calls of requests.

    Args:
        kinds: int64 [requests], 0 for a chat, 1 for an answer, 2 for a task.
        rounds: calls of each.
        task_class: its class, should it be a task.
    """
    count = len(kinds)
    calls = empty_calls(int(rounds.sum()))
    session = np.repeat(np.arange(count), rounds)
    ends = np.cumsum(rounds)
    is_first, is_last = np.zeros(len(calls), dtype=np.bool_), np.zeros(len(calls), dtype=np.bool_)
    is_first[ends - rounds], is_last[ends - 1] = True, True
    single = kinds[session] < 2
    drawn = length_table("azure_conv_lengths").draw(len(calls), random)
    answers = np.where(is_last, _drawn(random, ANSWER, len(calls)), _drawn(random, CALL, len(calls)))
    outputs = np.minimum(np.where(single, drawn["output_tokens"], answers), MAX_TOKENS)
    added = np.where(is_first, _drawn(random, FIRST_PROMPT, len(calls)), _drawn(random, RESULT, len(calls)))
    prompt = 0
    for call in range(len(calls)):
        prompt = int(added[call]) if is_first[call] else prompt + int(outputs[call - 1]) + int(added[call])
        calls["prompt_tokens"][call] = min(prompt, MAX_PROMPT_TOKENS)
    alone = np.minimum(drawn["prompt_tokens"], MAX_PROMPT_TOKENS)
    calls["prompt_tokens"] = np.where(single, alone, calls["prompt_tokens"])
    calls["output_tokens"] = calls["first_stage_tokens"] = outputs
    calls["max_tokens"] = MAX_TOKENS
    answer_class = random.integers(1, num_answers + 1, count)
    by_request = np.select([kinds == 0, kinds == 1], [0 * answer_class, answer_class], task_class)
    calls["class_index"] = by_request[session]
    calls["session"] = session
    calls["next_call"] = np.where(is_last, -1, np.arange(1, len(calls) + 1))
    pauses_s = random.lognormal(np.log(PAUSE_S[0]) - 0.5 * PAUSE_S[1] ** 2, PAUSE_S[1], len(calls))
    calls["tool_s"] = np.where(is_first, 0.0, pauses_s)
    calls["arrival_s"] = np.where(is_first, 0.0, np.inf)
    return calls


def _drawn(random: Generator, shape: tuple[float, float], count: int) -> NDArray[np.int64]:
    mean, sigma = shape
    return np.clip(np.rint(random.lognormal(np.log(mean) - 0.5 * sigma**2, sigma, count)), 8, 4000).astype(np.int64)
