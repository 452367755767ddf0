"""Random faults on two real replicas under load: every request ends with its answer or an error that is documented.

python -m benchmarks.chaos [--rounds 10] [--seed 0] [--only FAULT]

Starts `slos-serve serve --replicas 2` with the small model on this machine's CPU. Each round is one fault: a killed
replica or engine core, a replica stopped for 5 s, its publications cut, garbage on every open port, its clock set off,
an update of the application, a disk that is full for it. Streams run all the time. Exits 1 when a request ends in any
other way, when a promise to a replica that was not harmed is broken, or when no request is promised and answered within
60 s after a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks._chaos_faults import FAULTS, Fleet

MODEL = "small"
# Wide enough for two engines on two cores of which one may be starting; a stream beyond them is broken all the same.
TTFT_S, TPOT_S = 30.0, 3.0
CHAT = f"{{ttft_ms: {TTFT_S * 1e3:.0f}, tpot_ms: {TPOT_S * 1e3:.0f}}}"
CLASSES = "default_class: chat\nclasses:\n  chat: " + CHAT + "\n  batch: {}\n"
STREAMS = 4
BACK_WITHIN_S, WHOLE_WITHIN_S, ANSWER_WITHIN_S = 60.0, 400.0, 240.0
CALM_S = 5.0
# (status, type) of the errors that docs/ray-serve.md names.
DOCUMENTED = {(503, "replica_lost"), (502, "replica_lost"), (503, "service_unavailable"), (429, "rate_limit_error")}


@dataclass(slots=True)
class Request:
    """One stream, as its client saw it.

    Attributes:
        begun_s, ended_s: when.
        outcome: ``whole``, or how it ended otherwise.
        verdict, replica, attempts: of its head.
        ttft_s, tpot_s: measured; ``None`` without a first and a second part.
    """

    begun_s: float
    ended_s: float = 0.0
    outcome: str = "never ended"
    verdict: str = ""
    replica: str = ""
    attempts: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def is_served(self) -> bool:
        """Whether it was promised and answered."""
        return self.ended_s > 0.0 and self.outcome == "whole" and self.verdict == "admitted"

    @property
    def is_kept(self) -> bool:
        """Whether its promises were kept, as far as there were any."""
        return not self.is_served or ((self.ttft_s or 0.0) <= TTFT_S and (self.tpot_s or 0.0) <= TPOT_S)


@dataclass(slots=True)
class Load:
    """Streams without an end.

    Attributes:
        url: of the endpoint.
        requests: all that were begun.
    """

    url: str
    requests: list[Request] = field(default_factory=list)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, seed: int, clients: int = STREAMS) -> None:
        """Serve so many clients until :meth:`end`."""
        limits = httpx.Timeout(ANSWER_WITHIN_S)
        async with httpx.AsyncClient(timeout=limits) as client:
            await asyncio.gather(*(self._client(client, random.Random(seed + n)) for n in range(clients)))

    def end(self) -> None:
        """Begin no more; those that run end."""
        self._ended.set()

    async def _client(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        while not self._ended.is_set():
            request = Request(time.monotonic())
            self.requests.append(request)
            await self.serve(client, request, rng)
            if request.outcome != "whole":
                await asyncio.sleep(0.5)

    async def serve(
        self, client: httpx.AsyncClient, request: Request, rng: random.Random, headers: Mapping[str, str] | None = None
    ) -> None:
        """One stream, until it has ended in whatever way; ``headers`` beside those of its class."""
        try:
            await asyncio.wait_for(self._stream(client, request, rng, headers or {}), ANSWER_WITHIN_S)
        except Exception as error:
            request.outcome = f"undocumented: {type(error).__name__} {error}"[:200]
        request.ended_s = time.monotonic()

    async def _stream(
        self, client: httpx.AsyncClient, request: Request, rng: random.Random, more: Mapping[str, str]
    ) -> None:
        body = {
            "model": MODEL,
            "prompt": "Tell me of " + " ".join(str(rng.randrange(100)) for _ in range(rng.randrange(1, 60))),
            "max_tokens": rng.randrange(4, 32),
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"x-slo-class": "chat" if rng.random() < 0.8 else "batch", **more}
        times: list[float] = []
        async with client.stream("POST", f"{self.url}/v1/completions", json=body, headers=headers) as answer:
            request.verdict = answer.headers.get("x-slo-verdict", "")
            request.replica = answer.headers.get("x-slo-replica", "")
            request.attempts = int(answer.headers.get("x-slo-attempts", 0))
            if not answer.is_success:
                request.outcome = _told(answer.status_code, await answer.aread())
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                document = json.loads(line.removeprefix("data: "))
                if "error" in document:
                    request.outcome = _told(int(document["error"]["code"]), line.removeprefix("data: ").encode())
                    return
                times.append(time.monotonic())
                if document["choices"][0]["finish_reason"] == "length":
                    request.outcome = "whole"
        if times:
            request.ttft_s = times[0] - request.begun_s
        if len(times) > 1:
            request.tpot_s = (times[-1] - times[0]) / (body["max_tokens"] - 1)  # type: ignore[operator]
        if request.outcome != "whole":
            request.outcome = f"undocumented: cut off after {len(times)} parts"


def _told(status: int, body: bytes) -> str:
    """An error in a word, if it is one of those documented."""
    try:
        kind = json.loads(body)["error"]["type"]
    except (ValueError, KeyError, TypeError):
        return f"undocumented: {status} {body[:150]!r}"
    return f"{status} {kind}" if (status, kind) in DOCUMENTED else f"undocumented: {status} {body[:150]!r}"


async def serve_again(load: Load, since_s: float, within_s: float) -> float | None:
    """Seconds until a request that began after ``since_s`` was promised and answered; ``None`` when none was."""
    until_s = since_s + within_s
    while time.monotonic() < until_s:
        ends = [one.ended_s for one in load.requests if one.begun_s >= since_s and one.is_served]
        if ends:
            return min(ends) - since_s
        await asyncio.sleep(0.2)
    return None


async def whole_again(load: Load, fleet: Fleet, since_s: float) -> float | None:
    """Seconds until two replicas that live now have answered promised requests; ``None`` when they do not."""
    while time.monotonic() < since_s + WHOLE_WITHIN_S:
        seen = {one.replica for one in load.requests if one.begun_s >= since_s and one.is_served}
        if len(seen) >= 2 and len(fleet.replicas()) == 2:
            return time.monotonic() - since_s
        await asyncio.sleep(0.5)
    return None


async def play(fleet: Fleet, options: argparse.Namespace) -> int:
    """All rounds; how many rules were broken."""
    rng = random.Random(options.seed)
    names = [options.only] if options.only else list(FAULTS)
    order = [name for _ in range(-(-options.rounds // len(names))) for name in rng.sample(names, len(names))]
    load = Load(fleet.url)
    running = asyncio.create_task(load.run(options.seed))
    broken = 0
    await serve_again(load, time.monotonic(), WHOLE_WITHIN_S)
    for number, name in enumerate(order[: options.rounds]):
        begun_s = time.monotonic()
        note = await asyncio.to_thread(FAULTS[name], fleet, rng)
        over_s = time.monotonic()
        again_s = await serve_again(load, over_s, BACK_WITHIN_S)
        whole_s = await whole_again(load, fleet, over_s)
        ended = Counter(one.outcome for one in load.requests if one.ended_s >= begun_s)
        broken += (again_s is None) + (whole_s is None)
        what = f"{name} ({note})"
        print(
            f"{number + 1:3} {what:28} served again after {_seconds(again_s)}, by both after {_seconds(whole_s)}; "
            + ", ".join(f"{count} {outcome}" for outcome, count in ended.most_common()),
            flush=True,
        )
        await asyncio.sleep(CALM_S)
    load.end()
    await running
    return broken + judge(load, fleet)


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"


def judge(load: Load, fleet: Fleet) -> int:
    """Print what became of all requests; how many broke a rule."""
    wrong = [one for one in load.requests if one.outcome != "whole" and one.outcome not in _documented()]
    promised = [one for one in load.requests if one.is_served and one.attempts == 1 and not fleet.was_harmed(one)]
    missed = [one for one in promised if not one.is_kept]
    total = Counter(one.outcome for one in load.requests)
    print(f"{len(load.requests)} requests: " + ", ".join(f"{count} {name}" for name, count in total.most_common()))
    print(f"{len(promised)} promised on replicas that were not harmed, {len(missed)} of these promises broken")
    slowest = max((one.ttft_s or 0.0 for one in promised), default=0.0)
    print(f"slowest first token among them {slowest:.1f} s, promised {TTFT_S:.0f} s")
    for one in [*wrong, *missed][:20]:
        print(f"BROKEN: {one}")
    return len(wrong) + len(missed)


def _documented() -> set[str]:
    return {f"{status} {kind}" for status, kind in DOCUMENTED}


def main(arguments: Sequence[str]) -> int:
    """Play; 1 when a rule was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="faults, one after the other")
    parser.add_argument("--seed", type=int, default=0, help="of their order and of the load")
    parser.add_argument("--only", choices=sorted(FAULTS), help="this fault alone")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="chaos", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with Fleet.started(folder, MODEL, CLASSES) as fleet:
            broken = asyncio.run(play(fleet, options))
            left = fleet.unfinished()
    print("every rule held" if not broken else f"{broken} rules broken", *left, sep="; " if left else "")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
