"""An hour of two real replicas at half load: do processes, files or sockets grow?

python -m benchmarks.soak_served [--minutes 60] [--warm-up 10] [--rate 1.5] [--seed 0]

Starts `slos-serve serve --replicas 2` with the small model on this machine's CPU. Eight clients without a pause find
out what it carries; then streams come as a Poisson process at half of that, or at ``--rate``, one in four of them with
a session that has had calls before. Every minute: memory (PSS, by kind of process), open files and sockets of all.
Exits 1 when a request does not end whole, or when after the warm-up memory grows by more than 2 %, or files or sockets
by more than requests are running.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks._chaos_faults import ENGINES, Fleet
from benchmarks.chaos import ANSWER_WITHIN_S, CLASSES, MODEL, WHOLE_WITHIN_S, Load, Request, serve_again
from tests.ray.processes import below, command_line

PROBE_CLIENTS, PROBE_S = 8, 90.0
MOST_GROWTH = 0.02
SESSION_SHARE, SESSION_CALLS = 0.25, 4
LOOK_EVERY_S = 60.0
# What a process is, by the first of these that its command line has.
KINDS = {"engine core": "EngineCore", "replica": ENGINES, "ray serve": "Serve", "front": "slos_serve", "ray": "ray"}


@dataclass(frozen=True, slots=True)
class Held:
    """What processes hold.

    Attributes:
        kib: proportional set size.
        files: open files that are no sockets.
        sockets: open sockets.
        processes: of this kind.
    """

    kib: int = 0
    files: int = 0
    sockets: int = 0
    processes: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(
            self.kib + other.kib,
            self.files + other.files,
            self.sockets + other.sockets,
            self.processes + other.processes,
        )


def held(pid: int) -> Held:
    """By one process; nothing when it has just ended."""
    sockets = files = kib = 0
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                is_socket = str(link.readlink()).startswith("socket:")
                sockets, files = sockets + is_socket, files + (not is_socket)
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                kib = int(line.split()[1])
    except OSError:
        return Held()
    return Held(kib, files, sockets, 1)


def by_kind(root: int) -> dict[str, Held]:
    """What all processes below ``root`` hold, by kind."""
    found: dict[str, Held] = {}
    for pid in below(root):
        line = command_line(pid)
        kind = next((name for name, part in KINDS.items() if part in line), "other")
        found[kind] = found.get(kind, Held()) + held(pid)
    return found


@dataclass
class Soak:
    """What was seen, minute by minute."""

    fleet: Fleet
    load: Load
    began_s: float = field(default_factory=time.monotonic)
    seen: list[Held] = field(default_factory=list)
    running: list[int] = field(default_factory=list)

    def look(self) -> None:
        """One row of the table."""
        kinds = by_kind(self.fleet.server.pid)
        total = sum(kinds.values(), Held())
        self.seen.append(total)
        ended = sum(one.ended_s > 0.0 for one in self.load.requests)
        self.running.append(len(self.load.requests) - ended)
        parts = ", ".join(f"{name} {one.kib / 1024:.0f}" for name, one in sorted(kinds.items()))
        print(
            f"{(time.monotonic() - self.began_s) / 60.0:6.1f}{ended:9}{self.running[-1]:9}{total.processes:11}"
            f"{total.kib / 1024:10.1f}{total.files:7}{total.sockets:9}   {parts}",
            flush=True,
        )

    def broken(self, warm_up: int) -> list[str]:
        """The rules that were broken after ``warm_up`` looks."""
        first, later = self.seen[warm_up], self.seen[warm_up:]
        found = [f"{name}: {count}" for name, count in outcomes(self.load).items() if name != "whole"]
        grown = max(one.kib for one in later) / first.kib - 1.0
        print(f"memory after the warm-up: {grown:+.1%} at most, {later[-1].kib / first.kib - 1.0:+.1%} at the end")
        if grown > MOST_GROWTH:
            found.append(f"memory grew by {grown:.1%}")
        # A stream is a socket of its client, of the front and of what lies between.
        room = 4 * max(self.running[warm_up:])
        for name in ("files", "sockets"):
            more = max(getattr(one, name) for one in later) - getattr(first, name)
            print(
                f"{name} after the warm-up: {more:+} at most, {getattr(later[-1], name) - getattr(first, name):+} end"
            )
            if more > room:
                found.append(f"{more} more {name}")
        return found


def outcomes(load: Load) -> Counter[str]:
    """How requests ended."""
    return Counter(one.outcome for one in load.requests)


async def capacity_of(url: str, seed: int) -> float:
    """Requests a second that clients without a pause get served."""
    load, clients = Load(url), PROBE_CLIENTS
    running = asyncio.create_task(load.run(seed, clients))
    await asyncio.sleep(PROBE_S)
    served = sum(one.is_served for one in load.requests)
    load.end()
    await running
    return served / PROBE_S


async def arrive(load: Load, rate: float, until_s: float, rng: random.Random) -> None:
    """Streams of a Poisson process until ``until_s``; ends when the last one has."""
    waiting: set[asyncio.Task[None]] = set()
    sessions: Counter[str] = Counter()
    next_s = time.monotonic()
    async with httpx.AsyncClient(timeout=httpx.Timeout(ANSWER_WITHIN_S)) as client:
        while (next_s := next_s + rng.expovariate(rate)) < until_s:
            await asyncio.sleep(max(next_s - time.monotonic(), 0.0))
            headers = {}
            if rng.random() < SESSION_SHARE:
                headers["x-session-id"] = session_of(sessions, rng)
            request = Request(time.monotonic())
            load.requests.append(request)
            one = asyncio.create_task(load.serve(client, request, rng, headers))
            waiting.add(one)
            one.add_done_callback(waiting.discard)
        await asyncio.gather(*waiting)


def session_of(calls: Counter[str], rng: random.Random) -> str:
    """A session that has not had its last call, or a new one; counts the call."""
    if not calls or rng.random() < 1.0 / SESSION_CALLS:
        calls[f"session-{rng.randrange(10**9)}"] = 0
    name = rng.choice(list(calls))
    calls[name] += 1
    if calls[name] == SESSION_CALLS:
        del calls[name]
    return name


async def play(fleet: Fleet, options: argparse.Namespace) -> list[str]:
    """The whole run; the rules that were broken."""
    first = Load(fleet.url)
    running = asyncio.create_task(first.run(options.seed, 1))
    await serve_again(first, time.monotonic(), WHOLE_WITHIN_S)
    first.end()
    await running
    rate = options.rate
    if rate is None:
        carried = await capacity_of(fleet.url, options.seed)
        rate = carried / 2.0
        print(f"{PROBE_CLIENTS} clients without a pause are served {carried:.2f} requests a second", flush=True)
    print(f"{rate:.2f} requests a second for {options.minutes:.0f} minutes", flush=True)
    print("minute    ended  running  processes   PSS MiB  files  sockets   MiB by kind", flush=True)
    soak = Soak(fleet, Load(fleet.url))
    until_s = time.monotonic() + options.minutes * 60.0
    arriving = asyncio.create_task(arrive(soak.load, rate, until_s, random.Random(options.seed)))
    while not arriving.done():
        await asyncio.wait({arriving}, timeout=LOOK_EVERY_S)
        await asyncio.to_thread(soak.look)
    await arriving
    ended = outcomes(soak.load)
    print(f"{len(soak.load.requests)} requests: " + ", ".join(f"{count} {name}" for name, count in ended.most_common()))
    verdicts = Counter(one.verdict for one in soak.load.requests)
    print("verdicts: " + ", ".join(f"{count} {name or 'none'}" for name, count in verdicts.most_common()))
    return soak.broken(int(options.warm_up))


def main(arguments: Sequence[str]) -> int:
    """Run; 1 when a rule was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="of load")
    parser.add_argument("--warm-up", type=int, default=10, help="minutes that may grow")
    parser.add_argument("--rate", type=float, help="requests a second; half of what is carried by default")
    parser.add_argument("--seed", type=int, default=0, help="of the load")
    options = parser.parse_args(arguments)
    if options.minutes < options.warm_up + 1:
        parser.error(f"--minutes {options.minutes:g}: at least one more than --warm-up {options.warm_up}")
    with (
        tempfile.TemporaryDirectory(prefix="soak", ignore_cleanup_errors=True) as name,
        Fleet.started(Path(name), MODEL, CLASSES) as fleet,
    ):
        broken = asyncio.run(play(fleet, options))
        broken += fleet.unfinished()
    print("every rule held" if not broken else "; ".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
