"""Requests from a recorded trace: its arrivals and lengths, with text of our own in place of the prompts.

Traces hold lengths in tokens and no text. How many words make a token on this server is measured with two requests
before the run, so that prompts come close to the recorded lengths with any tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slos_serve.bench.client import LoadClient
from slos_serve.bench.prompts import plain_text
from slos_serve.bench.requests import BenchRequest, FollowUp
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet
from slos_serve.metrics.summary import Outcome
from slos_serve.workload.trace_files import TraceRequest, calls_before

_PROBE_WORDS = (50, 250)


@dataclass(frozen=True, slots=True)
class WordsPerToken:
    """Tokens of a prompt as a line in its words: ``fixed_tokens`` (chat template) + ``tokens_per_word`` * words."""

    fixed_tokens: float
    tokens_per_word: float

    def words_for(self, tokens: int) -> int:
        """Words whose prompt has about ``tokens`` tokens; at least 1."""
        return max(1, round((tokens - self.fixed_tokens) / self.tokens_per_word))


async def measure_words_per_token(client: LoadClient, seed: int) -> WordsPerToken:
    """Send two short prompts and see how many tokens the server counts.

    Raises:
        InvalidFieldError: the server refused them or reports no prompt tokens.
    """
    probes = [
        BenchRequest(f"probe-{words}", 0.0, plain_text(np.random.default_rng([seed, words]), words), 1)
        for words in _PROBE_WORDS
    ]
    result = await client.run(probes)
    counts = [response.prompt_tokens for response in result.responses]
    failed = [response for response in result.responses if response.outcome is not Outcome.COMPLETED]
    if failed or counts[1] <= counts[0]:
        told = failed[0].error if failed else f"prompt_tokens {counts}"
        raise InvalidFieldError(
            "usage.prompt_tokens", told, "counts of prompt tokens from the server, needed by --trace"
        )
    slope = (counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
    return WordsPerToken(counts[0] - slope * _PROBE_WORDS[0], slope)


def trace_window(
    trace: Sequence[TraceRequest], rate_per_s: float | None, duration_s: float | None
) -> list[tuple[float, TraceRequest]]:
    """The trace's first ``duration_s`` seconds with their arrival times, sped up or slowed down to a mean rate.

    Args:
        trace: in order of arrival, times from 0.
        rate_per_s: mean rate wanted; ``None`` keeps the recorded times.
        duration_s: length of the run; ``None`` takes all of the trace.
    """
    factor = 1.0
    if rate_per_s is not None and len(trace) > 1 and trace[-1].arrival_s > 0.0:
        factor = (len(trace) - 1) / trace[-1].arrival_s / rate_per_s
    timed = [(factor * request.arrival_s, request) for request in trace]
    before = calls_before(trace)
    inside: list[bool] = []
    for (at_s, _), waits_for in zip(timed, before, strict=True):  # a session that has begun goes on to its end
        inside.append(inside[waits_for] if waits_for >= 0 else duration_s is None or at_s < duration_s)
    return [one for one, stays in zip(timed, inside, strict=True) if stays]


def requests_from_trace(
    timed: Sequence[tuple[float, TraceRequest]], classes: ClassSet, words: WordsPerToken, seed: int
) -> list[BenchRequest]:
    """Requests with the trace's lengths, those that wait for an answer as what follows it.

    A row without a class gets the default class, or the only one.
    """
    fallback = default_class(classes)
    rng = np.random.default_rng(seed)
    prompts = [plain_text(rng, words.words_for(row.prompt_tokens)) for _, row in timed]
    before = calls_before([row for _, row in timed])
    within_ms = {row.session: row.task_ms for _, row in reversed(timed) if row.task_ms is not None}
    following: dict[int, FollowUp] = {}
    first: list[BenchRequest] = []
    for index in range(len(timed) - 1, -1, -1):
        at_s, row = timed[index]
        then, follows, task_ms = following.get(index), before[index] >= 0, within_ms.get(row.session)
        in_task = follows or then is not None or task_ms is not None
        request = BenchRequest(
            request_id=f"trace-{index:06d}",
            arrival_s=at_s,
            prompt=prompts[index],
            max_tokens=row.output_tokens,
            slo_class=row.slo_class or fallback,
            ttft_ms=row.ttft_ms,
            tpot_ms=row.tpot_ms,
            e2e_ms=row.e2e_ms,
            ignore_eos=True,
            session=row.session if in_task else None,
            task_ms=task_ms,
            last_call=in_task and then is None,
            then=then,
        )
        if follows:
            following[before[index]] = FollowUp((row.pause_ms or 0.0) / 1000.0, request)
        else:
            first.append(request)
    return first[::-1]


def default_class(classes: ClassSet) -> str | None:
    """The class of requests that name none: the default, or the only class there is; else none."""
    if classes.default is not None or len(classes) != 1:
        return classes.default
    return next(iter(classes)).name
