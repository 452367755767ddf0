"""benchmarks.soak_served: what processes hold, and what counts as growth."""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from benchmarks.chaos import Load, Request
from benchmarks.soak_served import SESSION_CALLS, Held, Soak, held, session_of


def soak(*seen: Held, outcome: str = "whole") -> Soak:
    load = Load("http://localhost")
    load.requests = [Request(0.0, 1.0, outcome)]
    fleet: Any = SimpleNamespace()
    return Soak(fleet, load, seen=list(seen), running=[1] * len(seen))


def test_open_files_and_sockets_of_a_process_are_told_apart(tmp_path: Path) -> None:
    before = held(os.getpid())
    with socket.socket(), (tmp_path / "f").open("w"):
        now = held(os.getpid())
    assert (now.sockets - before.sockets, now.files - before.files) == (1, 1)
    assert now.kib > 1000 and now.processes == 1


def test_a_process_that_is_gone_holds_nothing() -> None:
    assert held(2**22 + 1) == Held()


def test_what_grows_during_the_warm_up_does_not_count() -> None:
    flat = [Held(100_000, 50, 20), Held(200_000, 70, 30), Held(203_000, 70, 34), Held(202_000, 70, 31)]
    assert soak(*flat).broken(warm_up=1) == []


@pytest.mark.parametrize(
    ("last", "found"),
    [
        (Held(206_000, 70, 30), ["memory grew by 3.0%"]),
        (Held(200_000, 75, 30), ["5 more files"]),
        (Held(200_000, 70, 35), ["5 more sockets"]),
    ],
)
def test_growth_after_it_does(last: Held, found: list[str]) -> None:
    assert soak(Held(100_000, 50, 20), Held(200_000, 70, 30), last).broken(warm_up=1) == found


def test_a_request_that_did_not_end_whole_is_named() -> None:
    steady = Held(200_000, 70, 30)
    assert soak(steady, steady, outcome="502 replica_lost").broken(warm_up=0) == ["502 replica_lost: 1"]


def test_a_session_has_so_many_calls_at_most() -> None:
    rng, calls = random.Random(0), Counter[str]()
    made = Counter(session_of(calls, rng) for _ in range(400))
    assert max(made.values()) == SESSION_CALLS and len(calls) < 100
