"""The prefix cache against a plain one that knows every block by its whole beginning, as vLLM's does."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.policies.registry import make_policy
from slos_serve.sim.block_cache import UNUSED, empty_cache, leave, look_up, take, with_room
from slos_serve.sim.cluster import Cluster
from slos_serve.sim.engine_state import EngineState
from slos_serve.sim.limits import EngineLimits, ReplicaSettings
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.routers import make_router
from slos_serve.workload.calls import Workload
from slos_serve.workload.prefixes import cached_at_best, prefixes_of_turns
from tests.sim_builders import CHAT, PLAIN, workload

BLOCK = 16


def conversations(seed: int, count: int, most_prompt: int = 400) -> Workload:
    """Calls of which most continue an earlier one, all of them behind a common beginning."""
    random = np.random.default_rng(seed)
    before = np.where(random.random(count) < 0.6, random.integers(-1, np.maximum(np.arange(count), 1)), -1)
    before = np.minimum(before, np.arange(count) - 1)
    prompts, outputs = random.integers(60, 140, count), random.integers(1, 40, count)
    for call in np.flatnonzero(before >= 0):
        longer = prompts[before[call]] + outputs[before[call]] + random.integers(1, 50)
        prompts[call] = longer if longer <= most_prompt else prompts[call]
    load = workload(np.sort(random.random(count) * 0.05 * count).tolist(), prompts.tolist(), outputs.tolist())
    shared = prefixes_of_turns(prompts, outputs, before, common_tokens=50)
    return Workload("conversations", (CHAT,), load.calls, shared)


def answered_before_asked(count: int) -> Workload:
    """Turns of which every second one continues the one that comes after it: that finds its own answer in the cache."""
    prompts, outputs = np.tile([160, 260], count), np.tile([40, 20], count)
    times = np.repeat(np.arange(count), 2) + np.tile([0.5, 0.0], count)
    before = np.where(np.arange(2 * count) % 2 == 1, np.arange(2 * count) - 1, -1)
    load = workload(times.tolist(), prompts.tolist(), outputs.tolist())
    return Workload("answered before asked", (CHAT,), load.calls, prefixes_of_turns(prompts, outputs, before))


class PlainCache:
    """One block after the other in a queue of free blocks; requests come one at a time."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.free: OrderedDict[tuple[int, int], None] = OrderedDict()

    def serve(self, known: list[tuple[int, int]], prompt_tokens: int, used: int) -> int:
        """Cached tokens of a context of ``used`` blocks whose whole ones are ``known``."""
        hits = 0
        while hits < min(len(known), (prompt_tokens - 1) // BLOCK) and known[hits] in self.free:
            hits += 1
        for block in known[:hits]:
            del self.free[block]
        while len(self.free) > self.blocks - used:
            self.free.popitem(last=False)
        for block in known:
            self.free.pop(block, None)
        for block in reversed(known):
            self.free[block] = None
        return hits * BLOCK


@given(seed=st.integers(0, 10_000), blocks=st.integers(30, 120))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_one_after_the_other_hits_what_a_plain_cache_hits(seed: int, blocks: int) -> None:
    load = conversations(seed, 40)
    load.calls["arrival_s"] = 1000.0 * np.arange(40)
    recording = Recording.of(load.bound(PLAIN))
    replica = Replica(
        0, make_policy("vllm", PLAIN, 1), PLAIN, EngineLimits(blocks * BLOCK), recording, ReplicaSettings()
    )
    Cluster(recording, [replica], make_router("round-robin")).run()
    assert recording.completed.all()
    plain, prefixes = PlainCache(blocks), load.prefixes
    for call, row in enumerate(load.calls):
        context = int(row["prompt_tokens"] + row["output_tokens"]) - 1
        path = [*prefixes.path(call).tolist(), prefixes.num_shared + call]
        ends = [int(prefixes.end[node]) for node in path]
        known = [(path[int(np.searchsorted(ends, (i + 1) * BLOCK))], i) for i in range(context // BLOCK)]
        assert recording.calls["cached_tokens"][call] == plain.serve(
            known, int(row["prompt_tokens"]), -(-context // BLOCK)
        )


@pytest.mark.parametrize("load", [conversations(7, 150), answered_before_asked(20)], ids=["conversations", "answered"])
@pytest.mark.parametrize("policy", ["vllm", "sarathi", "slos-serve"])
def test_blocks_add_up_after_every_step(policy: str, load: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once in too little memory: what is held, what is cached and what is free make the whole."""
    load = Workload(load.name, load.classes, load.calls.copy(), load.prefixes)
    load.calls["arrival_s"] /= 4.0
    recording = Recording.of(load.bound(PLAIN))
    limits = EngineLimits(60 * BLOCK, max_num_batched_tokens=512)
    replica = Replica(0, make_policy(policy, PLAIN, 1), PLAIN, limits, recording, ReplicaSettings())
    checked = 0
    whole = EngineState.advance

    def advance(state: EngineState, count: int, end_s: float, seed: int) -> list[int]:
        nonlocal checked
        checked += 1
        finished = whole(state, count, end_s, seed)
        slots, cache = state.slots, state.cache
        there = slots.call_of >= 0
        own = int((slots.held - slots.referred)[there].sum())
        used = int(cache.blocks[cache.users > 0].sum())
        assert own >= 0 and state.view.free_blocks == 60 - own - used
        unused = int(cache.blocks[cache.users == 0].sum())
        assert cache.counts[UNUSED] == unused <= state.view.free_blocks
        return finished

    monkeypatch.setattr(EngineState, "advance", advance)
    Cluster(recording, [replica], make_router("round-robin")).run()
    assert recording.completed.all() and checked > 300
    assert recording.calls["cached_tokens"].sum() > 0.2 * load.calls["prompt_tokens"].sum()
    assert replica.view.free_blocks == 60


def test_two_that_run_side_by_side_hold_their_beginning_once() -> None:
    prefixes = prefixes_of_turns(np.array([160, 170, 180]), np.array([1, 1, 1]), np.array([-1, -1, -1]), 128)
    cache = empty_cache(prefixes, enabled=True)
    leave(cache, 0, 0, 160, BLOCK)  # the first call ran alone: 8 blocks of the beginning, 2 of its own
    assert look_up(cache, 1, 169, BLOCK) == (128, 1, 8)
    take(cache, 1, 1)
    assert look_up(cache, 2, 179, BLOCK) == (128, 1, 0)
    take(cache, 2, 1)
    assert leave(cache, 1, 1, 170, BLOCK) == 0  # the other one still uses it
    assert leave(cache, 2, 1, 180, BLOCK) == 8


def test_a_cache_that_is_off_finds_nothing() -> None:
    prefixes = prefixes_of_turns(np.array([160, 170]), np.array([1, 1]), np.array([-1, -1]), 128)
    cache = empty_cache(prefixes, enabled=False)
    leave(cache, 0, 0, 160, BLOCK)
    assert look_up(cache, 1, 169, BLOCK) == (0, 0, 0)


def test_a_full_queue_keeps_its_order() -> None:
    prefixes = prefixes_of_turns(np.full(9, 160), np.full(9, 1), np.full(9, -1))
    cache = empty_cache(prefixes, enabled=True)
    for _ in range(1000):
        for call in range(9):
            cache = with_room(cache, 1)
            leave(cache, call, 0, 160, BLOCK)
            if call < 8:
                take(cache, call, 1)
                leave(cache, call, 1, 160, BLOCK)
    assert len(cache.queue) <= 8192
    order = np.argsort(cache.freed)
    assert order.tolist() == list(range(9))


def test_what_a_cache_of_any_size_would_supply() -> None:
    load = conversations(3, 30)
    best = cached_at_best(load.prefixes, load.calls["prompt_tokens"], BLOCK)
    assert best[0] == 0 and np.all(best < load.calls["prompt_tokens"]) and np.all(best % BLOCK == 0)
    assert np.count_nonzero(best >= 48) >= 28  # all but the first begin alike
