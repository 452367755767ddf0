"""Batch-time models of machines nobody measured: model shape and device data sheet in, coefficients out.

    k_c = 2 P / (tp F e_c)        b_m = P w / (tp B e_b)        k_q = 2 h L / (tp F e_q)        k_ctx = K / (tp B e_k)
    b_c = r_b b_m                 k_m = r_k k_c

with P parameters in the layers, w bytes a weight, h the width of all heads, L layers, K bytes of KV cache a token, F
peak FLOP/s and B bytes/s of one device, tp devices. The efficiencies e and ratios r are fitted on measured profiles
(scripts/derive_profiles.py prints them and the error that each profile would have had, fitted on the others): step
times are then off by 4 to 7 % at the median and 11 to 20 % at p90. Good for planning capacity, not for serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.batch_time import BatchTimeModel

MEMORY_SHARE = 0.9  # of the device's memory that an engine may use
ACTIVATION_BYTES = 2e9  # kept free for activations and the runtime
LAYER_LAUNCH_S = 40e-6  # about ten kernels a layer, 4 us each: what a layer takes that is too small to fill a device


@dataclass(frozen=True, slots=True)
class Device:
    """Data sheet of an accelerator: dense 16-bit FLOP/s, bytes/s, and the bytes that its driver reports."""

    name: str
    peak_flops: float
    bandwidth: float
    memory: float


DEVICES = {
    "a100": Device("A100-80G SXM", 312e12, 2.039e12, 85e9),
    "h100": Device("H100-80G SXM", 989e12, 3.35e12, 85e9),
    "h200": Device("H200-141G SXM", 989e12, 4.8e12, 150e9),
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a transformer decides its times.

    Attributes:
        layers, hidden: depth and width.
        heads_width: heads * head size, what attention multiplies over.
        kv_width: KV heads * head size.
        layer_parameters: parameters in the layers, embeddings apart.
        embedding_parameters: of input and output embedding.
        bytes_per_weight: 2 for 16-bit weights and KV cache.
    """

    layers: int
    hidden: int
    heads_width: int
    kv_width: int
    layer_parameters: float
    embedding_parameters: float
    bytes_per_weight: float = 2.0

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token, all layers."""
        return 2.0 * self.layers * self.kv_width * self.bytes_per_weight


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the data sheet that were reached, and ratios between branches; see the module's formulas."""

    compute: float
    weights: float
    attention: float
    kv_read: float
    b_c_ratio: float
    k_m_ratio: float
    tp_share: float  # what each doubling of the tensor-parallel degree leaves of the speed-up


# Printed by scripts/derive_profiles.py.
FITTED = Efficiency(
    compute=0.675, weights=0.618, attention=0.167, kv_read=0.798, b_c_ratio=0.597, k_m_ratio=0.694, tp_share=0.994
)


def model_shape(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """Shape from a Hugging Face ``config.json`` of a decoder (OPT, Llama and their like).

    Raises:
        InvalidFieldError: a field is missing or not a positive whole number.
    """

    def count(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise InvalidFieldError(name, value, "a whole number, 1 or more", where)
                return value
        if default is None:
            raise InvalidFieldError(names[0], None, "a whole number, 1 or more", where)
        return default

    hidden = count("hidden_size", "n_embd", "d_model")
    layers = count("num_hidden_layers", "n_layer")
    heads = count("num_attention_heads", "n_head")
    head_size = count("head_dim", default=hidden // heads)
    kv_heads = count("num_key_value_heads", default=heads)
    inner = count("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    gated = config.get("hidden_act") in ("silu", "swiglu", "geglu") or config.get("model_type") in ("llama", "mistral")
    attention = hidden * head_size * (2 * heads + 2 * kv_heads)
    feed_forward = (3 if gated else 2) * hidden * inner
    tables = 1 if config.get("tie_word_embeddings", False) else 2
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads_width=heads * head_size,
        kv_width=kv_heads * head_size,
        layer_parameters=float(layers * (attention + feed_forward)),
        embedding_parameters=float(tables * hidden * count("vocab_size")),
    )


def roofline(
    shape: ModelShape, device: Device, tensor_parallel: int = 1, efficiency: Efficiency = FITTED
) -> BatchTimeModel:
    """Batch-time model of a shape on ``tensor_parallel`` devices."""
    if tensor_parallel < 1:
        raise InvalidFieldError("tensor_parallel", tensor_parallel, "a whole number, 1 or more")
    doublings = (tensor_parallel - 1).bit_length()
    speed_up = tensor_parallel * efficiency.tp_share**doublings
    weights = shape.layer_parameters * shape.bytes_per_weight
    k_c = 2.0 * shape.layer_parameters / (device.peak_flops * efficiency.compute * speed_up)
    b_m = weights / (device.bandwidth * efficiency.weights * speed_up)
    return BatchTimeModel(
        k_c_s=k_c,
        b_c_s=efficiency.b_c_ratio * b_m,
        k_m_s=efficiency.k_m_ratio * k_c,
        b_m_s=b_m,
        k_ctx_s=shape.kv_bytes_per_token / (device.bandwidth * efficiency.kv_read * speed_up),
        k_q_s=2.0 * shape.heads_width * shape.layers / (device.peak_flops * efficiency.attention * speed_up),
    )


def draft_step_s(shape: ModelShape, device: Device, context_tokens: float, efficiency: Efficiency = FITTED) -> float:
    """Seconds of one sequential step of a draft model on one device.

        launches + weights and (tied) embedding read once + KV cache of ``context_tokens`` read once

    The formulas above fit models that fill a device; a draft model is too small for that, so its kernels' launches
    count on their own.
    """
    weights = (shape.layer_parameters + shape.embedding_parameters) * shape.bytes_per_weight
    read_s = weights / (device.bandwidth * efficiency.weights)
    context_s = shape.kv_bytes_per_token * context_tokens / (device.bandwidth * efficiency.kv_read)
    return LAYER_LAUNCH_S * shape.layers + read_s + context_s


def kv_capacity_tokens(shape: ModelShape, device: Device, tensor_parallel: int = 1) -> int:
    """Tokens of KV cache that fit beside the weights.

    Raises:
        InvalidFieldError: the weights alone do not fit.
    """
    weights = (shape.layer_parameters + shape.embedding_parameters) * shape.bytes_per_weight
    left = tensor_parallel * (MEMORY_SHARE * device.memory - ACTIVATION_BYTES) - weights
    tokens = int(left / shape.kv_bytes_per_token)
    if tokens < 1:
        raise InvalidFieldError("tensor_parallel", tensor_parallel, f"enough devices for {weights / 1e9:.0f} GB")
    return tokens
