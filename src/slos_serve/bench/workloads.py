"""Named workloads: which kinds of requests, how long, how many, when.

A workload is a mix of parts; each part is one kind of prompt under one SLO class. Everything is drawn from one seeded
generator, so the same seed sends the same requests at the same times to any server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slos_serve.bench.prompts import (
    PromptMaker,
    chat_question,
    coding_task,
    document_to_summarise,
    text_to_edit,
)
from slos_serve.bench.requests import BenchRequest
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import NO_SLO_CLASS, ClassSet


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal length, cut to a range.

    Attributes:
        median: of the distribution before the cut.
        sigma: of the logarithm; 0 gives the median every time.
        low, high: smallest and largest value drawn.
    """

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: np.random.Generator, scale: float = 1.0) -> int:
        """One length, at least 1."""
        drawn = self.median * np.exp(self.sigma * rng.standard_normal())
        return max(1, round(scale * float(np.clip(drawn, self.low, self.high))))


@dataclass(frozen=True, slots=True)
class WorkloadPart:
    """One kind of request.

    Attributes:
        slo_class: name of its class; ``None`` sends it without an SLO.
        make_prompt: text from a generator and a number of words.
        prompt_words: length of the prompt.
        max_tokens: cap on the answer.
        share: part of the requests, relative to the other parts.
    """

    slo_class: str | None
    make_prompt: PromptMaker
    prompt_words: Lengths
    max_tokens: Lengths
    share: float = 1.0


CHAT = WorkloadPart("chat", chat_question, Lengths(90, 0.8, 25, 800), Lengths(160, 0.5, 32, 512))
CODING = WorkloadPart("coding", coding_task, Lengths(140, 0.7, 40, 900), Lengths(128, 0.4, 32, 384))
SUMMARIZATION = WorkloadPart(
    "summarization", document_to_summarise, Lengths(1100, 0.4, 300, 2600), Lengths(120, 0.3, 48, 256)
)
EDITING = WorkloadPart("editing", text_to_edit, Lengths(140, 0.5, 50, 500), Lengths(200, 0.4, 64, 640))

WORKLOADS: Mapping[str, tuple[WorkloadPart, ...]] = {
    "chat": (CHAT,),
    "coding": (CODING,),
    "summarization": (SUMMARIZATION,),
    "editing": (EDITING,),
    "mixed": (CHAT, CODING, SUMMARIZATION),
}


def find_workload(name: str) -> tuple[WorkloadPart, ...]:
    """The parts of a named workload.

    Raises:
        InvalidFieldError: there is none of that name.
    """
    if name not in WORKLOADS:
        raise InvalidFieldError("workload", name, f"one of {sorted(WORKLOADS)}")
    return WORKLOADS[name]


def with_known_classes(parts: Sequence[WorkloadPart], classes: ClassSet) -> tuple[WorkloadPart, ...]:
    """The parts with classes that the class file has; its default class stands in for one that it lacks.

    Raises:
        InvalidFieldError: a class is missing and there is no default.
    """
    known = {slo_class.name for slo_class in classes}
    mapped = []
    for part in parts:
        if part.slo_class is not None and part.slo_class not in known | {NO_SLO_CLASS}:
            if classes.default is None:
                raise InvalidFieldError(
                    "classes", sorted(known), f"a class '{part.slo_class}' or a default_class for it", "class file"
                )
            mapped.append(replace(part, slo_class=classes.default))
        else:
            mapped.append(part)
    return tuple(mapped)


def arrival_times(
    rng: np.random.Generator, rate_per_s: float, duration_s: float, cv: float = 1.0
) -> NDArray[np.float64]:
    """Arrival times in [0, duration_s): a renewal process with gamma gaps.

    Args:
        rng: source of randomness.
        rate_per_s: mean arrivals a second.
        duration_s: length of the run.
        cv: coefficient of variation of the gaps: 1 is Poisson, above is bursty, 0 is a metronome.
    """
    if not rate_per_s > 0.0:
        raise InvalidFieldError("rate", rate_per_s, "a number of requests a second above 0")
    if not duration_s > 0.0:
        raise InvalidFieldError("duration", duration_s, "a number of seconds above 0")
    if not 0.0 <= cv <= 100.0:
        raise InvalidFieldError("arrival_cv", cv, "a number in [0, 100]")
    mean_s = 1.0 / rate_per_s
    times: list[float] = []
    at_s = _gap(rng, mean_s, cv)
    while at_s < duration_s:
        times.append(at_s)
        at_s += _gap(rng, mean_s, cv)
    return np.array(times, dtype=np.float64)


def make_requests(
    parts: Sequence[WorkloadPart],
    arrivals_s: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    phase: str = "",
    length_scale: float = 1.0,
    ignore_eos: bool = False,
    id_prefix: str = "bench",
) -> list[BenchRequest]:
    """One request for each arrival, its part drawn by share."""
    shares = np.array([part.share for part in parts], dtype=np.float64)
    picks = rng.choice(len(parts), size=len(arrivals_s), p=shares / shares.sum())
    requests = []
    for index, (arrival_s, pick) in enumerate(zip(arrivals_s, picks, strict=True)):
        part = parts[int(pick)]
        requests.append(
            BenchRequest(
                request_id=f"{id_prefix}-{index:05d}",
                arrival_s=float(arrival_s),
                prompt=part.make_prompt(rng, part.prompt_words.draw(rng, length_scale)),
                max_tokens=part.max_tokens.draw(rng, length_scale),
                slo_class=part.slo_class,
                phase=phase,
                ignore_eos=ignore_eos,
            )
        )
    return requests


def _gap(rng: np.random.Generator, mean_s: float, cv: float) -> float:
    if cv == 0.0:
        return mean_s
    shape = 1.0 / (cv * cv)
    return float(rng.gamma(shape, mean_s / shape))
