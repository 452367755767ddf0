"""Each feature that is steered, on vLLM's real scheduler: no worse than stock.

docs/vllm.md's table of features names these tests. A test plays one or more scenes on stock and on ours: the same
answers, no exception, no fallback, no fault on the device, and first tokens at most two steps after stock's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from slos_serve.testing.request import DryTokenizer
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.config import CLASSES_ENV, EVENTS_ENV, PROFILE_ENV
from slos_serve.vllm_plugin.scheduler import SLOScheduler
from tests.vllm.dry_load import CLASSES, events, write_profile
from tests.vllm.feature_probes import Outcome, compare, play
from tests.vllm.scenes import SCENES

Compare = Callable[..., None]
BY_NAME = {scene.name: scene for scene in SCENES}


since_31 = pytest.mark.skipif(
    compat.version_of(compat.engine_version()) < (0, 31), reason="this vLLM has no --max-num-active-seqs"
)
# On 0.29 the imaginary device does not run images to their end, with vLLM's own scheduler either.
images = pytest.mark.skipif(compat.version_of(compat.engine_version()) < (0, 31), reason="images need vLLM 0.31 here")


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a class file and a profile that the plug-in reads."""
    (tmp_path / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    write_profile(tmp_path / "profile.json", compat.engine_version())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(CLASSES_ENV, str(tmp_path / "classes.yaml"))
    monkeypatch.setenv(PROFILE_ENV, str(tmp_path / "profile.json"))
    return tmp_path


@pytest.fixture
def no_worse_than_stock(configured: Path) -> Compare:
    """Play the named scenes on both."""

    def check(*names: str) -> None:
        complaints = {name: compare(BY_NAME[name], configured) for name in names}
        assert not any(complaints.values()), complaints

    return check


@pytest.fixture
def ours(configured: Path) -> Callable[[str], Outcome]:
    """Play a scene on ours alone."""
    return lambda name: play(BY_NAME[name], configured, SLOScheduler)


def test_structured_output_first_token(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("structured output, compiled", "structured output, compiling", "structured output, one in five")


def test_remote_kv_first_token(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("KV connector, remote prefill", "KV connector, all slots taken", "KV connector, offload")


def test_kv_producer_keeps_blocks_until_sent(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("KV connector, producer", "KV connector, producer, little KV")


def test_lora_adapters_are_kept_within_max_loras(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("LoRA, max_loras 1", "LoRA, max_loras 2")


def test_padded_start(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("padded start")


def test_streaming_sessions(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("streaming input, parked", "streaming input, second turn")


@since_31
def test_max_num_active_seqs(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("max_num_active_seqs", "max_num_seqs")


def test_long_prefill_token_threshold(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("long_prefill_token_threshold")


def test_unchunked_prefill(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("chunked prefill off")


def test_a_prompt_of_the_whole_budget(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("a prompt of the whole budget")


def test_no_async_scheduling(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("no async scheduling")


def test_pipeline_cadence(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("pipeline parallel, async")


def test_pipeline_parallel_without_async_scheduling_is_right_or_refused(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("pipeline parallel, no async")


def test_prefill_throttling(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("prefill throttling")


def test_model_runner_v2(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("model runner V2")


@images
def test_encoder_budget(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("images")


def test_hybrid_groups(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("sliding window")


def test_mamba_alignment(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("Mamba, align")


def test_interruptions(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("pause and resume", "prefix cache reset", "aborts")


def test_little_kv(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("little KV", "little KV, drafts")


def test_a_long_cached_prefix(no_worse_than_stock: Compare) -> None:
    no_worse_than_stock("long cached prefix")


def test_an_answer_cut_by_a_stop_string_is_finished_and_keeps_its_promise(
    ours: Callable[[str], Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EVENTS_ENV, str(tmp_path / "events.jsonl"))
    monkeypatch.setattr("vllm.tokenizers.cached_tokenizer_from_config", lambda _: DryTokenizer())
    outcome = ours("stop strings")
    assert set(outcome.finished.values()) == {"stop string"}
    ended = events(tmp_path, "request")
    assert len(ended) == 20
    assert {event["finished"] for event in ended} == {"stop"}
    assert all(event["ttft_ok"] and event["tpot_ok"] for event in ended)
