"""The scenes of :mod:`tests.vllm.feature_probes`, by feature."""

from __future__ import annotations

from vllm.v1.core.sched.interface import PauseState

from slos_serve.testing.request import KVLoad, RequestFeatures
from slos_serve.testing.scheduler import Setup
from tests.vllm.feature_probes import CHAT, Play, Scene

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
CONSUMER, PRODUCER = Setup(kv_role="kv_consumer"), Setup(kv_role="kv_producer")
LORA = {"enable_lora": True, "max_lora_rank": 8}


# Structured output ----------------------------------------------------------------------------------------------------


def _grammar_ready(play: Play) -> None:
    play.streams()
    play.watch("json", play.prompt(200), features=RequestFeatures(grammar_steps=0))
    play.watch("json without a promise", play.prompt(200), slo=None, features=RequestFeatures(grammar_steps=0))
    play.until_first("json", "json without a promise")


def _grammar_compiles(play: Play) -> None:
    play.streams()
    play.watch("json", play.prompt(200), features=RequestFeatures(grammar_steps=7))
    play.watch("plain", play.prompt(200))
    play.watch("json without a promise", play.prompt(200), slo=None, features=RequestFeatures(grammar_steps=3))
    play.until_first("json", "json without a promise")


def _grammars_one_in_five(play: Play) -> None:
    play.streams(2)
    for number in range(20):
        grammar = RequestFeatures(grammar_steps=number % 3) if number % 5 == 0 else RequestFeatures()
        play.watch(f"r{number}", play.prompt(150), 30, features=grammar)
        play.steps(10)


# KV connectors --------------------------------------------------------------------------------------------------------


def _remote_prefill(play: Play) -> None:
    play.streams()
    play.watch("loaded", play.prompt(2000), features=RequestFeatures(load=KVLoad(2000)))
    play.watch("loaded, no promise", play.prompt(1000), slo=None, features=RequestFeatures(load=KVLoad(1000)))
    play.until_first("loaded", "loaded, no promise")


def _remote_prefill_full_house(play: Play) -> None:
    play.streams(4, answer=60)
    for number in range(4):
        play.watch(f"loaded{number}", play.prompt(500), 30, features=RequestFeatures(load=KVLoad(500, steps=2)))
        play.steps(1)
    play.steps(20)


def _offloaded(play: Play) -> None:
    play.streams()
    play.watch("sync", play.prompt(1000), features=RequestFeatures(load=KVLoad(900, is_async=False)))
    play.watch("unsure", play.prompt(1000), features=RequestFeatures(load=KVLoad(800, unsure_asks=3)))
    play.watch("broken", play.prompt(600), features=RequestFeatures(load=KVLoad(600, fails=True)))
    play.until_first("sync", "unsure", "broken")


def _producer(play: Play) -> None:
    play.streams(3, answer=120)
    for number in range(12):
        send = RequestFeatures(send_steps=8)
        play.watch(f"sent{number}", play.prompt(400), 1 if number % 2 else 40, features=send)
        play.steps(3)


# LoRA -----------------------------------------------------------------------------------------------------------------


def _two_adapters(play: Play) -> None:
    for number in range(12):
        adapter = RequestFeatures(adapter=1 + number % 2)
        play.watch(f"r{number}", play.prompt(400), 40, features=adapter)
        play.steps(4)


def _more_adapters(play: Play) -> None:
    play.streams(2)
    for number in range(24):
        adapter = RequestFeatures(adapter=number % 5)
        play.watch(f"r{number}", play.prompt(300), 30, slo=CHAT if number % 3 else None, features=adapter)
        play.steps(3)


# Speculation ----------------------------------------------------------------------------------------------------------


def _padded_start(play: Play) -> None:
    prompt = play.prompt(161)
    play.engine.add("before", prompt, 2)
    play.engine.run()
    play.streams()
    play.watch("cached", prompt)
    play.until_first("cached")


# Streaming input ------------------------------------------------------------------------------------------------------


def _parked_sessions(play: Play) -> None:
    for number in range(2):
        play.engine.add(f"session{number}", play.prompt(50), 3, CHAT, RequestFeatures(resumable=True))
    play.until_first("session0", "session1")
    play.steps(8)
    for number in range(3):
        play.watch(f"plain{number}", play.prompt(200), 40)
    play.steps(30)
    for number in range(2):
        play.engine.add_turn(f"session{number}", play.prompt(60), 5, CHAT)
    play.steps(20)
    for number in range(2):
        play.engine.close(f"session{number}")


def _second_turn(play: Play) -> None:
    play.engine.add("session", play.prompt(50), 3, CHAT, RequestFeatures(resumable=True))
    play.until_first("session")
    play.steps(6)
    play.streams()
    before = len(play.engine.answers["session"])
    play.engine.add_turn("session", play.prompt(60), 5, CHAT)
    started = play.engine.all_steps
    while len(play.engine.answers["session"]) == before and play.engine.all_steps < started + 400:
        play.engine.step()
    assert play.engine.all_steps - started <= 6, f"second turn after {play.engine.all_steps - started} steps"
    play.steps(10)
    play.engine.close("session")


# Limits ---------------------------------------------------------------------------------------------------------------


def _active_seqs(play: Play) -> None:
    scheduler = play.engine.scheduler
    for number in range(10):
        play.watch(f"r{number}", play.prompt(200), 30)
    for _ in range(60):
        play.engine.step()
        assert len(scheduler.running) <= scheduler.max_num_active_reqs, f"{len(scheduler.running)} running"


def _few_slots(play: Play) -> None:
    for number in range(12):
        play.watch(f"r{number}", play.prompt(300), 25, slo=CHAT if number % 2 else None)
        play.steps(2)


def _long_prefill(play: Play) -> None:
    play.streams(2)
    play.watch("long", play.prompt(1900), 10)
    play.watch("short", play.prompt(60), 10)
    play.until_first("long", "short")


def _whole_prompts(play: Play) -> None:
    play.streams(2)
    for number in range(4):
        play.watch(f"r{number}", play.prompt(3000), 20)
        play.steps(2)


def _full_budget(play: Play) -> None:
    play.watch("budget", play.prompt(2048), 10)


# Pipeline and data parallel -------------------------------------------------------------------------------------------


def _loaded(play: Play) -> None:
    for number in range(24):
        play.watch(f"r{number}", play.prompt(100 + 37 * number), 40, slo=CHAT if number % 3 else None)
        play.steps(3)


def _all_promised(play: Play) -> None:
    """As :func:`_loaded`; requests without a promise would wait for the planner's lead, whatever the pipeline."""
    for number in range(24):
        play.watch(f"r{number}", play.prompt(100 + 37 * number), 40)
        play.steps(3)


def _throttled(play: Play) -> None:
    play.streams()
    for number in range(4):
        play.watch(f"r{number}", play.prompt(300), 20)
    for step in range(60):
        play.engine.step(throttle_prefills=step % 4 != 0)


# Interruptions --------------------------------------------------------------------------------------------------------


def _paused(play: Play) -> None:
    play.streams()
    play.watch("before", play.prompt(500))
    play.steps(1)
    for state in (PauseState.PAUSED_NEW, PauseState.PAUSED_ALL, PauseState.UNPAUSED):
        play.engine.scheduler.set_pause_state(state)
        play.steps(6)
        play.watch(f"under {state.name}", play.prompt(300), features=RequestFeatures(grammar_steps=1))
    play.steps(20)


def _prefix_cache_reset(play: Play) -> None:
    play.streams()
    for number in range(3):
        play.watch(f"r{number}", play.prompt(800))
        play.steps(5)
        play.engine.scheduler.reset_prefix_cache(reset_running_requests=True)


def _aborts(play: Play) -> None:
    play.streams(6)
    for number in range(8):
        grammar = RequestFeatures(grammar_steps=2) if number % 2 else RequestFeatures()
        play.watch(f"r{number}", play.prompt(1500), features=grammar)
        play.steps(2)
        if number % 3 == 0:
            play.abort(f"r{number}")
            play.abort(f"stream{number // 3}")
    play.steps(10)


def _stop_strings(play: Play) -> None:
    for number in range(20):
        play.watch(f"r{number}", play.prompt(200), 500, features=RequestFeatures(stop_after=20))
        play.steps(6)


def _little_kv(play: Play) -> None:
    for number in range(16):
        play.watch(f"r{number}", play.prompt(300), 120, slo=CHAT if number % 2 else None)
        play.steps(8)


def _same_long_prefix(play: Play) -> None:
    shared = play.prompt(6000)
    play.engine.add("first", shared, 1)
    play.engine.run()
    play.streams()
    for number in range(6):
        play.watch(f"r{number}", shared[:5984] + play.prompt(20), 10)
    play.until_first(*(f"r{number}" for number in range(6)))


# Images and other KV --------------------------------------------------------------------------------------------------


def _images(play: Play) -> None:
    play.streams(2)
    for number in range(4):
        images = RequestFeatures(images=((10, 500), (600, 300)))
        play.watch(f"r{number}", play.prompt(1000), 20, features=images)
        play.steps(2)


SCENES = (
    Scene("structured output, compiled", _grammar_ready),
    Scene("structured output, compiling", _grammar_compiles),
    Scene("structured output, one in five", _grammars_one_in_five),
    Scene("KV connector, remote prefill", _remote_prefill, CONSUMER),
    Scene("KV connector, all slots taken", _remote_prefill_full_house, CONSUMER, {"max_num_seqs": 4}, counted=True),
    Scene("KV connector, offload", _offloaded, Setup(kv_role="kv_both")),
    Scene("KV connector, producer", _producer, PRODUCER, counted=True),
    Scene("KV connector, producer, little KV", _producer, PRODUCER, {"num_blocks": 120}, scarce=True),
    Scene("LoRA, max_loras 1", _two_adapters, arguments=LORA | {"max_loras": 1}, counted=True),
    Scene("LoRA, max_loras 2", _more_adapters, arguments=LORA | {"max_loras": 2}, scarce=True),
    Scene("padded start", _padded_start, arguments={"speculative_config": NGRAM}),
    Scene("streaming input, parked", _parked_sessions, arguments={"max_num_seqs": 3}, scarce=True),
    Scene("streaming input, second turn", _second_turn),
    Scene("max_num_active_seqs", _active_seqs, arguments={"max_num_active_seqs": 2}, counted=True),
    Scene("max_num_seqs", _few_slots, arguments={"max_num_seqs": 3}, counted=True),
    Scene("long_prefill_token_threshold", _long_prefill, arguments={"long_prefill_token_threshold": 100}),
    Scene(
        "chunked prefill off",
        _whole_prompts,
        arguments={"enable_chunked_prefill": False, "max_num_batched_tokens": 8192},
        scarce=True,
    ),
    Scene("a prompt of the whole budget", _full_budget),
    Scene("no async scheduling", _loaded, arguments={"async_scheduling": False}, counted=True),
    Scene(
        "pipeline parallel, async",
        _all_promised,
        Setup(runner_v2=True),
        {"pipeline_parallel_size": 2},
        counted=True,
        most_steps_later=4,  # two steps overlap: each is half of a plain engine's
    ),
    Scene(
        "pipeline parallel, no async",
        _loaded,
        arguments={"pipeline_parallel_size": 2, "async_scheduling": False},
        may_refuse=True,
        counted=True,
    ),
    Scene("prefill throttling", _throttled),
    Scene("model runner V2", _loaded, Setup(runner_v2=True), counted=True),
    Scene("pause and resume", _paused, counted=True),
    Scene("prefix cache reset", _prefix_cache_reset, counted=True),
    Scene("aborts", _aborts, counted=True),
    Scene("stop strings", _stop_strings),
    Scene("little KV", _little_kv, arguments={"num_blocks": 150}, scarce=True),
    Scene("little KV, drafts", _little_kv, arguments={"num_blocks": 150, "speculative_config": NGRAM}, scarce=True),
    Scene("long cached prefix", _same_long_prefix, counted=True),
    Scene("images", _images, Setup(encoder_tokens=600), counted=True),
    Scene("sliding window", _loaded, Setup(kv_groups=("full", "sliding"))),
    Scene("Mamba, align", _loaded, Setup(kv_groups=("full", "mamba")), {"block_size": 64}, counted=True),
)
