"""Random episodes of an engine's life, the same for a seed: what is switched on, who comes when, what happens.

Every feature draws from a generator of its own, so that leaving one out changes nothing of the others: a failing
episode is made smaller by leaving features out as long as it fails.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.config import SchedulerConfig
from vllm.v1.core.sched.interface import PauseState

from slos_serve.testing.dry_engine import DryEngine
from slos_serve.testing.request import KVLoad, RequestFeatures
from slos_serve.testing.scheduler import Setup
from slos_serve.vllm_plugin import compat

STEPS = 220
MOST_TOKENS = 640
# Share of the episodes that have it.
SHARES = {
    "lora": 0.2, "grammar": 0.25, "connector": 0.25, "sessions": 0.2, "drafts": 0.3, "pipeline": 0.15, "sync": 0.2,
    "runner_v2": 0.4, "active": 0.2, "slots": 0.4, "budget": 0.4, "long_prefill": 0.2, "unchunked": 0.1, "images": 0.15,
    "sliding": 0.1, "mamba": 0.1, "little_kv": 0.4, "prefixes": 0.4, "aborts": 0.4, "pause": 0.2, "reset": 0.15,
    "throttle": 0.15, "stop": 0.2,
}  # fmt: skip
Event = Callable[[DryEngine], None]


@dataclass
class Episode:
    """One episode.

    Attributes:
        seed: what it is drawn from.
        features: what is on.
        setup, arguments: of the scheduler.
        events: step -> what happens before it.
        sure: requests whose answers have to be the stock answers to the last token.
        sessions: requests whose turns are answers of their own; no first token is waited for.
        throttled: steps in which data-parallel balancing defers prompts.
    """

    seed: int
    features: frozenset[str]
    setup: Setup = field(default_factory=Setup)
    arguments: dict[str, Any] = field(default_factory=dict)
    events: dict[int, list[Event]] = field(default_factory=dict)
    sure: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)
    sessions: set[str] = field(default_factory=set)
    throttled: set[int] = field(default_factory=set)

    def at(self, step: int, event: Event) -> None:
        """Let something happen before a step."""
        self.events.setdefault(step, []).append(event)


def episode_of(seed: int, without: Collection[str] = (), most_requests: int = 26) -> Episode:
    """The episode of a seed, some features left out."""
    found = {name for name, share in SHARES.items() if _dice(seed, name).random() < share} - set(without)
    found -= _excluded(found)
    episode = Episode(seed, frozenset(found))
    _configure(episode)
    _requests(episode, most_requests)
    _interruptions(episode)
    return episode


def _dice(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _excluded(found: set[str]) -> set[str]:
    """What vLLM itself does not combine."""
    out: set[str] = set()
    if "connector" in found:
        out |= {"sliding", "mamba", "sessions"}
    if "mamba" in found:
        out |= {"sliding", "drafts", "long_prefill"}
    if "unchunked" in found:
        out |= {"budget", "long_prefill", "mamba"}
    if "sync" not in found and "pipeline" in found:
        found |= {"runner_v2"}
        out |= {
            "lora"
        }  # vLLM counts no adapters of running requests whose turn it is not: stock asserts in one of five
    if not hasattr(SchedulerConfig, "max_num_active_seqs"):  # before 0.31; images do not end on the device there either
        out |= {"active", "images", "sessions"}  # what a session keeps of its last turn depends on the steps in flight
    if "drafts" in found and compat.version_of(compat.engine_version()) < (0, 29):
        out |= {"reset"}  # stock 0.26 itself answers otherwise in half of such episodes under async scheduling
    if "sync" in found:
        out |= {"runner_v2"} if "pipeline" in found else set()
    return out


def _configure(episode: Episode) -> None:
    on, seed = episode.features, episode.seed
    dice = _dice(seed, "configuration")
    arguments: dict[str, Any] = {"max_model_len": 1024, "num_blocks": 1000, "async_scheduling": "sync" not in on}
    if "lora" in on:
        arguments |= {"enable_lora": True, "max_lora_rank": 8, "max_loras": int(_dice(seed, "loras").integers(1, 4))}
    if "drafts" in on:
        count = int(_dice(seed, "draft count").integers(1, 5))
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": count,
            "prompt_lookup_max": 3,
        }
    if "pipeline" in on:
        arguments["pipeline_parallel_size"] = int(_dice(seed, "stages").integers(2, 4))
    if "active" in on:
        arguments["max_num_active_seqs"] = int(_dice(seed, "active seqs").integers(1, 6))
    arguments["max_num_seqs"] = int(_dice(seed, "seqs").integers(1, 9)) if "slots" in on else 32
    arguments["max_num_seqs"] = max(arguments["max_num_seqs"], arguments.get("max_num_active_seqs", 1))
    arguments["max_num_batched_tokens"] = int(_dice(seed, "tokens").choice([48, 96, 200])) if "budget" in on else 512
    if "unchunked" in on:
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024}
    if "long_prefill" in on:
        arguments["long_prefill_token_threshold"] = int(_dice(seed, "threshold").integers(20, 150))
    groups = ("full", "sliding") if "sliding" in on else ("full", "mamba") if "mamba" in on else ("full",)
    if "little_kv" in on:
        arguments["num_blocks"] = int(_dice(seed, "blocks").integers(60, 140)) * len(groups)
    role = str(dice.choice(["kv_consumer", "kv_producer", "kv_both"])) if "connector" in on else ""
    encoder = 200 if "images" in on else 0
    arguments["max_num_batched_tokens"] = max(arguments["max_num_batched_tokens"], arguments["max_num_seqs"], encoder)
    if "drafts" in on:
        arguments["max_num_batched_tokens"] = max(arguments["max_num_batched_tokens"], 8 * arguments["max_num_seqs"])
    episode.arguments = arguments
    episode.setup = Setup(kv_groups=groups, runner_v2="runner_v2" in on, kv_role=role, encoder_tokens=encoder)


def _requests(episode: Episode, most: int) -> None:
    dice = _dice(episode.seed, "requests")
    shared = [int(token) for token in dice.integers(5, 30_000, 400)]
    for number in range(min(int(dice.integers(4, 27)), most)):
        own = _dice(episode.seed, f"request {number}")
        step = int(own.integers(0, STEPS - 40))
        tokens = [int(token) for token in own.integers(5, 30_000, min(int(own.exponential(150)) + 8, 500))]
        if "prefixes" in episode.features and own.random() < 0.7:
            tokens = shared[: int(own.integers(0, 25)) * 16] + tokens
        tokens, answer = tokens[-500:], int(own.integers(1, 60))
        slo, name = _promise(own), f"r{number}"
        features = _features_of(episode, number, len(tokens), answer)
        if features.resumable:
            _session(episode, name, step, own)
        elif "aborts" in episode.features and _dice(episode.seed, f"abort {number}").random() < 0.25:
            later = int(_dice(episode.seed, f"abort step {number}").integers(0, 40))
            episode.at(step + later, lambda engine, name=name: engine.abort(name))  # type: ignore[misc]
            episode.aborted.add(name)
        else:
            episode.sure.add(name)
        episode.at(step, _enter(name, tokens, answer, slo, features))


def _enter(name: str, tokens: list[int], answer: int, slo: dict[str, Any] | None, features: RequestFeatures) -> Event:
    return lambda engine: engine.add(name, tokens, answer, slo, features)


def _promise(dice: np.random.Generator) -> dict[str, Any] | None:
    kind = int(dice.integers(0, 5))
    if kind == 0:
        return None
    if kind == 1:
        return {"slo_ttft_ms": float(dice.integers(20, 3000)), "slo_tpot_ms": float(dice.integers(20, 300))}
    return {"slo_class": str(dice.choice(["chat", "code", "think"]))}


def _features_of(episode: Episode, number: int, prompt_tokens: int, answer: int) -> RequestFeatures:
    on, seed = episode.features, episode.seed

    def drawn(name: str) -> np.random.Generator:
        return _dice(seed, f"{name} {number}")

    features: dict[str, Any] = {}
    if "sessions" in on and drawn("session").random() < 0.3:
        return RequestFeatures(resumable=True)
    if "grammar" in on and drawn("grammar").random() < 0.4:
        features["grammar_steps"] = int(drawn("grammar steps").integers(0, 12))
    if "lora" in on:
        features["adapter"] = int(drawn("adapter").integers(0, 5))
    if "connector" in on:
        dice = drawn("load")
        if dice.random() < 0.5:
            is_async = bool(dice.random() < 0.7)
            features["load"] = KVLoad(
                tokens=int(dice.integers(1, prompt_tokens + 1)) // 16 * 16,
                is_async=is_async,
                steps=int(dice.integers(1, 8)),
                unsure_asks=int(dice.integers(0, 3)),
                fails=is_async and bool(dice.random() < 0.2),
            )
        features["send_steps"] = int(drawn("send").integers(0, 8))
    if "images" in on and prompt_tokens > 60 and drawn("images").random() < 0.5:
        features["images"] = ((8, int(drawn("image").integers(10, min(prompt_tokens - 20, 190)))),)
    if "stop" in on and drawn("stop").random() < 0.3:
        features["stop_after"] = int(drawn("stop after").integers(1, answer + 1))
    return RequestFeatures(**features)


def _session(episode: Episode, name: str, step: int, dice: np.random.Generator) -> None:
    episode.sessions.add(name)
    for _ in range(int(dice.integers(0, 3))):
        step += int(dice.integers(1, 30))
        chunk = [int(token) for token in dice.integers(5, 30_000, int(dice.integers(8, 60)))]
        answer, slo = int(dice.integers(1, 15)), _promise(dice)
        episode.at(step, _turn(name, chunk, answer, slo))
    last = step + int(dice.integers(1, 60))
    episode.at(last, lambda engine: engine.close(name))


def _turn(name: str, chunk: list[int], answer: int, slo: dict[str, Any] | None) -> Event:
    return lambda engine: engine.add_turn(name, chunk, answer, slo)


def _interruptions(episode: Episode) -> None:
    on, seed = episode.features, episode.seed
    if "pause" in on:
        dice = _dice(seed, "pauses")
        start = int(dice.integers(5, STEPS - 30))
        state = PauseState.PAUSED_ALL if dice.random() < 0.5 else PauseState.PAUSED_NEW
        episode.at(start, lambda engine: engine.scheduler.set_pause_state(state))
        episode.at(start + int(dice.integers(1, 20)), _resume)
    if "reset" in on:
        dice = _dice(seed, "resets")
        running = bool(dice.random() < 0.7) and "connector" not in on and "sessions" not in on
        for step in dice.integers(5, STEPS, 2):
            episode.at(int(step), lambda engine: engine.scheduler.reset_prefix_cache(reset_running_requests=running))
    if "throttle" in on:
        episode.throttled = {int(step) for step in np.flatnonzero(_dice(seed, "throttled").random(STEPS) < 0.5)}


def _resume(engine: DryEngine) -> None:
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
