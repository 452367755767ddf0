"""A request on its way through the API process: what was said of it, and what its engine core is told."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace

from slos_serve.core.slo import SLOClass
from slos_serve.core.told import Told, known
from slos_serve.perf.tasks import CallDue
from slos_serve.vllm_plugin.class_versions import ClassVersion
from slos_serve.vllm_plugin.front.mirror import Answer


@dataclass(slots=True)
class Judged:
    """One HTTP request on its way through the server, and what was said of it.

    Attributes:
        slo_class: its class, ``None`` without a promise.
        arrival_s: when it arrived.
        version: of the class file that it is judged by.
        answer: the verdict; ``None`` while, or where, it is not judged. Of several prompts the worst.
        given: the class with the promise that it was given, or that it asked for; ``None`` while it is not judged.
        ttft_target_s: promised seconds to the first token; ``inf`` without.
        targets_s: the same for each promise that its class names, in order.
        refusal: status and seconds to wait, for a request that is refused.
        first_s, last_s: when the first and the newest part of the answer were sent.
        call, call_came_s: the call of a task that it is, ``None`` for none; its times count from vLLM's stamp.
        tickets: of its requests to the engine: ticket -> vLLM's id.
        open: of those that the engine decides on: ticket -> vLLM's id; empty once the client is told.
        hoped: the worst of what the mirror said of its requests; ``answer`` counts nothing that the engine decides on.
        late_rank: largest rank among the promises that it was given.
        decided: set when it has made one to each.
        uncounted: requests whose verdict is not in the metrics yet.
        late: its client hears nothing of further requests: its head is out, it is over, or the first of them run.
    """

    slo_class: SLOClass | None
    arrival_s: float
    version: ClassVersion
    answer: Answer | None = None
    given: SLOClass | None = None
    ttft_target_s: float = math.inf
    targets_s: list[float] = field(default_factory=list)
    refusal: tuple[int, int] | None = None
    first_s: float | None = None
    last_s: float | None = None
    call: CallDue | None = None
    call_came_s: float = 0.0
    tickets: dict[int, str] = field(default_factory=dict)
    open: dict[int, str] = field(default_factory=dict)
    hoped: Answer | None = None
    late_rank: int = 0
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    uncounted: int = 0
    late: bool = False

    def runs(self) -> None:
        """What it asked of the engine at once is there: it is neither refused nor told anything else from now on."""
        self.late = True

    def told(self) -> Told:
        """What its client is told."""
        answer, call, held_to = self.answer, self.call, self.given or self.slo_class
        found = Told(
            None if self.slo_class is None else self.slo_class.name,
            target_ttft_s=self.ttft_target_s,
            target_tpot_s=math.inf if held_to is None else held_to.slo.tpot_s,
            target_e2e_s=math.inf if call is None else call.due_s - self.call_came_s,
            task_left_s=math.inf if call is None else call.task_due_s - self.call_came_s,
        )
        if answer is None:
            return found
        return replace(
            found,
            verdict=answer.verdict,
            reason=answer.reason,
            rank=answer.rank,
            predicted_ttft_s=known(answer.ttft_s),
            predicted_tpot_s=known(answer.tpot_s),
            predicted_start_s=known(answer.start_s),
        )


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What the engine core is told of a request.

    Attributes:
        ticket: number by which its publications name the request once it has come.
        told: rank of the promise that its client was told, which binds the engine; ``None`` without one.
    """

    ticket: int
    told: int | None


def prompt_tokens(prompt: object) -> int | None:
    """Tokens of what vLLM's API hands to its engine; ``None`` where that cannot be told."""
    if isinstance(prompt, dict):
        for key in ("prompt_token_ids", "prompt_embeds"):
            found = prompt.get(key)
            if found is not None:
                return max(len(found), 1)
        return prompt_tokens(prompt.get("decoder_prompt")) if "decoder_prompt" in prompt else None
    found = getattr(prompt, "prompt_token_ids", None)
    return max(len(found), 1) if found is not None else None
