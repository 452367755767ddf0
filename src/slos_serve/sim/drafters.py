"""What drafts tokens for the served model, and what that costs: nothing (n-gram look-up) or a small model beside it.

A draft model costs three things: a sequential step for every draft token of a batch, its own share of every prompt
token, and memory for its weights and its KV cache. All three follow from its shape and the device's data sheet by the
formulas of :mod:`slos_serve.perf.roofline`; ``docs/simulator.md`` works the figures out.
"""

from __future__ import annotations

from dataclasses import replace

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.profile_file import Profile
from slos_serve.perf.roofline import DEVICES, Device, ModelShape, draft_step_s, model_shape, roofline
from slos_serve.sim.profiles import kv_bytes_per_token

NO_DRAFTER = "none"
NGRAM = "ngram"
# Part of the target's KV cache whose tokens a draft step reads: those that are verified together.
CONTEXT_SHARE = 0.25

OPT_125M = model_shape(
    {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "vocab_size": 50272,
        "tie_word_embeddings": True,
    }
)
DRAFT_MODELS: dict[str, ModelShape] = {"opt-125m": OPT_125M}
DRAFTERS = (NO_DRAFTER, NGRAM, *DRAFT_MODELS)


def with_drafter(profile: Profile, drafter: str) -> Profile:
    """The profile of the same engine with a drafter in it.

    Raises:
        InvalidFieldError: unknown drafter, or a draft model on a device whose data sheet is not known.
    """
    if drafter in (NO_DRAFTER, NGRAM):
        return profile
    if drafter not in DRAFT_MODELS:
        raise InvalidFieldError("drafter", drafter, f"one of {list(DRAFTERS)}")
    device = _device_of(profile)
    shape = DRAFT_MODELS[drafter]
    own = roofline(shape, device)
    served = profile.model
    context = CONTEXT_SHARE * profile.kv_capacity_tokens
    model = replace(
        served,
        k_c_s=served.k_c_s + own.k_c_s,
        k_m_s=served.k_m_s + own.k_m_s,
        k_s_s=draft_step_s(shape, device, context),
    )
    return replace(profile, model=model, kv_capacity_tokens=_kv_left(profile, shape))


def _kv_left(profile: Profile, shape: ModelShape) -> int:
    """Tokens that fit when each also takes KV of the drafter and its weights are there (on every device)."""
    each = kv_bytes_per_token(profile)
    parallel = profile.tensor_parallel
    weights = (shape.layer_parameters + shape.embedding_parameters) * shape.bytes_per_weight * parallel
    # The drafter is not split: every device holds all of its KV.
    tokens = (profile.kv_capacity_tokens * each - weights) / (each + parallel * shape.kv_bytes_per_token)
    if tokens < profile.block_size:
        raise InvalidFieldError("drafter", "no KV cache left", "a drafter that fits beside the model")
    return int(tokens)


def _device_of(profile: Profile) -> Device:
    for device in DEVICES.values():
        if device.name == profile.device:
            return device
    raise InvalidFieldError("drafter", profile.device, f"a profile of {[one.name for one in DEVICES.values()]}")
