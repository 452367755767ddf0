"""Roofline models: shapes from configs, scaling with devices, errors by field."""

from __future__ import annotations

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.roofline import DEVICES, kv_capacity_tokens, model_shape, roofline

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}


def test_llama_shape_counts_its_parameters() -> None:
    shape = model_shape(LLAMA)
    assert shape.layer_parameters == pytest.approx(6.476e9, rel=1e-3)
    assert shape.kv_bytes_per_token == 524_288


def test_grouped_heads_shrink_the_kv_cache() -> None:
    shape = model_shape({**LLAMA, "num_key_value_heads": 8})
    assert shape.kv_bytes_per_token == 524_288 / 4


def test_faster_devices_and_more_of_them_are_faster() -> None:
    shape = model_shape(LLAMA)
    a100, h100 = roofline(shape, DEVICES["a100"]), roofline(shape, DEVICES["h100"])
    two = roofline(shape, DEVICES["a100"], 2)
    assert h100.zero_load_s(2048) < two.zero_load_s(2048) < a100.zero_load_s(2048)
    assert two.zero_load_s(2048) > a100.zero_load_s(2048) / 2
    assert kv_capacity_tokens(shape, DEVICES["h200"]) > kv_capacity_tokens(shape, DEVICES["h100"])


@pytest.mark.parametrize(
    ("change", "field"), [({"hidden_size": 0}, "hidden_size"), ({"vocab_size": "x"}, "vocab_size")]
)
def test_broken_configs_name_the_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidFieldError, match=field):
        model_shape({**LLAMA, **change})


def test_weights_that_do_not_fit() -> None:
    shape = model_shape({**LLAMA, "num_hidden_layers": 320})
    with pytest.raises(InvalidFieldError, match="tensor_parallel"):
        kv_capacity_tokens(shape, DEVICES["a100"])
