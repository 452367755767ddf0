"""Which configurations are steered, stock or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from slos_serve.core.errors import UnsupportedEngineError
from slos_serve.vllm_plugin.capabilities import CAPABILITIES, Support, active, reason_for_stock


def config(**changes: Any) -> SimpleNamespace:
    """A resolved configuration of a plain text model; keys are ``part__field``."""
    found = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            is_diffusion=False,
            supports_multimodal_inputs=False,
            is_hybrid=False,
            is_attention_free=False,
            hf_text_config=SimpleNamespace(sliding_window=None),
        ),
        scheduler_config=SimpleNamespace(
            policy="fcfs",
            async_scheduling=True,
            enable_chunked_prefill=True,
            long_prefill_token_threshold=0,
            max_num_active_seqs=None,
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1, data_parallel_size=1),
        lora_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        speculative_config=None,
    )
    for key, value in changes.items():
        part, _, field = key.partition("__")
        setattr(getattr(found, part) if field else found, field or part, value)
    return found


def test_a_plain_engine_is_steered() -> None:
    assert reason_for_stock(config()) is None
    assert {row.support for row in active(config())} == {Support.STEERED}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"parallel_config__pipeline_parallel_size": 2, "scheduler_config__async_scheduling": False},
            "--async-scheduling",
        ),
        ({"model_config__is_encoder_decoder": True}, "--scheduler-cls"),
        ({"model_config__is_diffusion": True}, "--scheduler-cls"),
        ({"model_config__runner_type": "pooling"}, "--scheduler-cls"),
        ({"ec_transfer_config": SimpleNamespace()}, "--ec-transfer-config"),
    ],
)
def test_what_is_stock_says_which_option_to_change(changes: dict[str, Any], named: str) -> None:
    reason = reason_for_stock(config(**changes))
    assert reason is not None
    assert named in reason


def test_priority_scheduling_is_refused_in_one_sentence() -> None:
    with pytest.raises(UnsupportedEngineError, match="--scheduling-policy"):
        reason_for_stock(config(scheduler_config__policy="priority"))


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"lora_config": SimpleNamespace(max_loras=1)}, "LoRA"),
        ({"kv_transfer_config": SimpleNamespace(kv_role="kv_consumer")}, "KV connector, consumer"),
        ({"kv_transfer_config": SimpleNamespace(kv_role="kv_producer")}, "KV connector, producer"),
        ({"scheduler_config__enable_chunked_prefill": False}, "Prefill without chunks"),
        ({"scheduler_config__long_prefill_token_threshold": 100}, "Limit of long prefills"),
        ({"scheduler_config__max_num_active_seqs": 4}, "Limit of active requests"),
        ({"parallel_config__pipeline_parallel_size": 2}, "Pipeline parallel with async"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "EAGLE"),
        ({"speculative_config": SimpleNamespace(method="ngram")}, "n-gram"),
        ({"model_config__is_hybrid": True}, "Mamba"),
        ({"model_config__supports_multimodal_inputs": True}, "Multimodal"),
    ],
)
def test_a_feature_that_is_on_is_shown(changes: dict[str, Any], feature: str) -> None:
    plain = {row.feature for row in active(config())}
    shown = {row.feature for row in active(config(**changes))} - plain
    assert len(shown) == 1
    assert feature in shown.pop()


def test_every_row_that_is_not_steered_says_what_to_change() -> None:
    for row in CAPABILITIES:
        if row.support != Support.STEERED:
            assert "--" in row.note, row.feature
