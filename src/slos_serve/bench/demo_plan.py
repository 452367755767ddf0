"""What the demo sends, scaled from the measured profile so that it means the same on any machine.

Decides the classes' SLOs, the engine's capacity and the two phases. Promises are multiples of what this engine does
alone: a class's TPOT of its decode step, a TTFT of the prompt's zero-load time. Capacity is the fluid bound of design
section 5: the largest rate at which steps as long as the tightest TPOT still carry everything that arrives. The calm
phase offers a part of it, the burst a multiple. Lengths are fixed, so that both sides get the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml

from slos_serve.bench.prompts import chat_question, coding_task, document_to_summarise, text_to_edit
from slos_serve.bench.requests import BenchRequest
from slos_serve.bench.workloads import Lengths, WorkloadPart, arrival_times, make_requests
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.formula import features_s

# Context of a running request of the mix, for the decode step that promises are multiples of.
_CONTEXT_TOKENS = 200
# Tokens of the chat template; as tokens_per_word below counted with SmolLM2's tokenizer. Only rates hang on them.
TEMPLATE_TOKENS = 33.0

# A weaker promise, in times of the first one: the first token within most of the burst, tokens as fast as one reads.
WEAKER_TTFT, WEAKER_TPOT = 20.0, 4.0


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Knobs of the demo; the defaults are what README shows.

    Attributes:
        seed: of everything drawn.
        calm_s, burst_s: how long requests arrive in each phase.
        calm_parts: turns that the calm phase is cut into.
        calm_load, burst_load: offered load as a part of the capacity.
        decode_batch: decodes in the step that TPOTs are multiples of.
        editing: all prompts are texts to edit, which answers repeat in part (where drafts by lookup do well).
        weaker: each class has a weaker promise, for requests that cannot have the first one.
    """

    seed: int = 0
    calm_s: float = 28.0
    burst_s: float = 24.0
    calm_parts: int = 2
    calm_load: float = 0.45
    burst_load: float = 1.7
    decode_batch: int = 6
    editing: bool = False
    weaker: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """A part of the mix with its promise in multiples.

    Attributes:
        part: what is sent.
        tokens_per_word: of its prompts.
        tpot_steps, ttft_slowdown: its promise, in decode steps and in times of the prompt alone; ``None`` for none.
    """

    part: WorkloadPart
    tokens_per_word: float
    tpot_steps: float | None
    ttft_slowdown: float | None

    @property
    def prompt_tokens(self) -> float:
        """Of a typical prompt."""
        return TEMPLATE_TOKENS + self.tokens_per_word * self.part.prompt_words.median


_KINDS = (
    Kind(WorkloadPart("chat", chat_question, Lengths(45, 0.5, 22, 120), Lengths(40, 0, 40, 40), 0.4), 1.2, 3.0, 5.0),
    Kind(WorkloadPart("coding", coding_task, Lengths(55, 0.4, 35, 110), Lengths(40, 0, 40, 40), 0.3), 2.2, 1.8, 5.0),
    Kind(
        WorkloadPart("summarization", document_to_summarise, Lengths(190, 0.4, 110, 380), Lengths(28, 0, 28, 28), 0.2),
        1.25,
        3.0,
        3.0,
    ),
    Kind(WorkloadPart(None, text_to_edit, Lengths(60, 0.4, 35, 120), Lengths(40, 0, 40, 40), 0.1), 1.3, None, None),
)
_EDITING = tuple(
    replace(kind, part=replace(kind.part, make_prompt=text_to_edit), tokens_per_word=_KINDS[-1].tokens_per_word)
    for kind in _KINDS
)


@dataclass(frozen=True)
class DemoPlan:
    """Everything both sides get.

    Attributes:
        classes: what is promised.
        capacity_per_s: fluid bound of the mix in requests a second.
        decode_step_s: the decode step that TPOTs are multiples of.
        warm_up, burst: the requests of each part.
        calm_parts: those of each turn of the calm phase; arrivals count from the turn's start.
    """

    settings: DemoSettings
    classes: ClassSet
    capacity_per_s: float
    decode_step_s: float
    warm_up: list[BenchRequest]
    calm_parts: list[list[BenchRequest]]
    burst: list[BenchRequest]

    @property
    def calm(self) -> list[BenchRequest]:
        """The requests of the whole calm phase."""
        return [request for part in self.calm_parts for request in part]


def plan_demo(model: BatchTimeModel, settings: DemoSettings) -> DemoPlan:
    """Scale the demo to an engine."""
    step_s = decode_step_s(model, settings.decode_batch)
    classes = demo_classes(step_s, weaker=settings.weaker)
    tightest_s = min(slo_class.slo.tpot_s for slo_class in classes)
    kinds = _EDITING if settings.editing else _KINDS
    capacity = fluid_rate(model, tightest_s, kinds)
    rng = np.random.default_rng(settings.seed)
    parts = [kind.part for kind in kinds]
    warm_up = make_requests(parts, np.linspace(0.0, 2.0, 6), rng, phase="warm", id_prefix="warm")
    # The calm phase is steadier than Poisson: with some thirty requests a chance pile-up would be a small burst.
    calm_s = arrival_times(rng, settings.calm_load * capacity, settings.calm_s, cv=0.5)
    burst_s = arrival_times(rng, settings.burst_load * capacity, settings.burst_s)
    return DemoPlan(
        settings=settings,
        classes=classes,
        capacity_per_s=capacity,
        decode_step_s=step_s,
        warm_up=warm_up,
        calm_parts=in_turns(make_requests(parts, calm_s, rng, phase="calm", id_prefix="calm"), settings),
        burst=make_requests(parts, burst_s, rng, phase="burst", id_prefix="burst"),
    )


def in_turns(calm: Sequence[BenchRequest], settings: DemoSettings) -> list[list[BenchRequest]]:
    """Cut the calm phase into turns of equal length."""
    turn_s = settings.calm_s / settings.calm_parts
    turns: list[list[BenchRequest]] = [[] for _ in range(settings.calm_parts)]
    for request in calm:
        number = min(int(request.arrival_s / turn_s), settings.calm_parts - 1)
        turns[number].append(replace(request, arrival_s=request.arrival_s - number * turn_s))
    return turns


def decode_step_s(model: BatchTimeModel, batch: int) -> float:
    """Seconds of a step that decodes ``batch`` requests of the mix."""
    return model.step_s(BatchShape(new_tokens=batch, context_tokens=batch * _CONTEXT_TOKENS, num_seqs=batch))


def demo_classes(step_s: float, *, weaker: bool = False) -> ClassSet:
    """The three classes; no TTFT is below eight decode steps, which waiting for running batches may take."""
    found = {}
    for kind in _KINDS:
        if kind.part.slo_class is not None and kind.tpot_steps is not None:
            slo = SLO(
                ttft_slowdown=kind.ttft_slowdown,
                ttft_floor_ms=round(8000.0 * step_s, 1),
                tpot_ms=round(1000.0 * kind.tpot_steps * step_s, 1),
            )
            otherwise = (weakened(slo),) if weaker else ()
            found[kind.part.slo_class] = replace(single_stage(kind.part.slo_class, slo), otherwise=otherwise)
    return ClassSet(found)


def weakened(slo: SLO) -> SLO:
    """The weaker promise of the demo, for those who would wait for the end of a burst otherwise."""
    assert slo.ttft_slowdown is not None and slo.tpot_ms is not None
    return SLO(
        ttft_slowdown=WEAKER_TTFT * slo.ttft_slowdown,
        ttft_floor_ms=round(WEAKER_TTFT * slo.ttft_floor_ms, 1),
        tpot_ms=round(WEAKER_TPOT * slo.tpot_ms, 1),
    )


def classes_yaml(classes: ClassSet) -> str:
    """The class file of single-stage classes."""
    rows = {}
    for slo_class in classes:
        weaker = [_promise_row(slo) for slo in slo_class.otherwise]
        rows[slo_class.name] = _promise_row(slo_class.slo) | ({"otherwise": weaker} if weaker else {})
    return yaml.safe_dump({"classes": rows}, sort_keys=False)


def _promise_row(slo: SLO) -> dict[str, Any]:
    return {"ttft_slowdown": slo.ttft_slowdown, "ttft_floor_ms": slo.ttft_floor_ms, "tpot_ms": slo.tpot_ms}


def fluid_rate(model: BatchTimeModel, step_s: float, kinds: Sequence[Kind] = _KINDS) -> float:
    """Largest rate of the demo's mix at which steps of ``step_s`` carry all that arrives (docs/simulator.md).

    No queueing and no waste: real systems stay below it.
    """
    low, high = 0.0, 1.0
    while _mean_step_s(model, kinds, high, step_s) <= step_s:
        low, high = high, 2.0 * high
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _mean_step_s(model, kinds, middle, step_s) <= step_s else (low, middle)
    return low


def _mean_step_s(model: BatchTimeModel, kinds: Sequence[Kind], rate_per_s: float, step_s: float) -> float:
    """Mean seconds of a step of the mix at a rate, when a step begins every ``step_s``.

    Beyond the linear part of the roofline a mean batch stands for the real ones.
    """
    shares: Sequence[float] = [kind.part.share for kind in kinds]
    arrived = [rate_per_s * step_s * share / sum(shares) for share in shares]
    prompts = [kind.prompt_tokens for kind in kinds]
    answers = [kind.part.max_tokens.median for kind in kinds]
    decodes = [count * answer for count, answer in zip(arrived, answers, strict=True)]
    new = sum(count * prompt for count, prompt in zip(arrived, prompts, strict=True)) + sum(decodes)
    context = sum(d * (p + a / 2.0) for d, p, a in zip(decodes, prompts, answers, strict=True))
    quad = sum(count * prompt * prompt for count, prompt in zip(arrived, prompts, strict=True))
    sampled = sum(decodes) + sum(arrived)
    return float(features_s(model.coefficients, new, context, quad, sampled, 0.0))
