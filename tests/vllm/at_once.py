"""A crowd of clients that come to a real server at the same moment, and what became of them."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from slos_serve.vllm_plugin.front.desk import GAUGES_EVERY_S
from tests.vllm.hostile import MODEL


@dataclass(frozen=True)
class Outcomes:
    """What the engine's events say.

    Attributes:
        verdicts: of each request.
        kept: requests whose first token and pace were in time.
        slowness: measured over predicted time of the steps.
    """

    verdicts: list[str]
    kept: int
    slowness: float

    def __str__(self) -> str:
        promised = self.verdicts.count("admitted")
        return f"promised {promised}, kept {self.kept} with steps of {self.slowness:.2f} times their predicted length"


async def ask(client: httpx.AsyncClient, number: int) -> httpx.Response:
    """Send a prompt of 500 tokens; each begins otherwise, so that no prefix is cached."""
    body = {"model": MODEL, "prompt": f"{number} " + "word " * 500, "max_tokens": 4, "temperature": 0.0}
    return await client.post("/v1/completions", json=body, headers={"x-slo-class": "strict"})


async def ask_at_once(client: httpx.AsyncClient, numbers: Iterable[int]) -> tuple[list[httpx.Response], float]:
    """All answers, and seconds from the first request to the last refusal."""
    began_s = time.monotonic()
    refused_s = [0.0]

    async def one(number: int) -> httpx.Response:
        answer = await ask(client, number)
        if answer.status_code == 429:
            refused_s.append(time.monotonic() - began_s)
        return answer

    return list(await asyncio.gather(*(one(number) for number in numbers))), max(refused_s)


async def come_back(client: httpx.AsyncClient, number: int, refused: Sequence[httpx.Response]) -> list[bool]:
    """Whether those who come back when they were told to are served."""
    waits_s = sorted(int(answer.headers["retry-after"]) for answer in refused)

    async def again(number: int, wait_s: int) -> bool:
        await asyncio.sleep(wait_s)
        return (await ask(client, number)).is_success

    return list(await asyncio.gather(*(again(number + k, wait_s) for k, wait_s in enumerate(waits_s))))


async def headroom_at_rest(client: httpx.AsyncClient, slo_class: str) -> int:
    """Requests like the class's last one that could be promised, once the gauge has settled."""
    before, now = -1, await _headroom(client, slo_class)
    while before != now:
        await asyncio.sleep(2.0 * GAUGES_EVERY_S)
        before, now = now, await _headroom(client, slo_class)
    return now


async def _headroom(client: httpx.AsyncClient, slo_class: str) -> int:
    text = (await client.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "slos_serve:headroom_requests" and sample.labels["slo_class"] == slo_class:
                return int(sample.value)
    raise AssertionError(f"no headroom of {slo_class}")


async def outcomes(events: Path, from_line: int, count: int) -> Outcomes:
    """What the event file says from a line on, once ``count`` requests are in it."""
    for _ in range(100):
        lines = events.read_text(encoding="utf-8").splitlines()[from_line:]
        found = [json.loads(line) for line in lines]
        requests = [event for event in found if event["kind"] == "request"]
        if len(requests) >= count:
            break
        await asyncio.sleep(0.1)
    steps = [event for event in found if event["kind"] in ("step", "step_done")]
    pairs = [pair for pair in itertools.pairwise(steps) if [one["kind"] for one in pair] == ["step", "step_done"]]
    return Outcomes(
        verdicts=[event["verdict"] for event in requests],
        kept=sum(event["ttft_ok"] and event["tpot_ok"] for event in requests),
        slowness=sum(done["measured_ms"] for _, done in pairs) / sum(made["predicted_ms"] for made, _ in pairs),
    )
