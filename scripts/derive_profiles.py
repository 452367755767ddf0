"""Derives the shipped GPU profiles: measured ones from published fits, the others from the roofline generator.

    python scripts/derive_profiles.py --data FOLDER

FOLDER holds distserve_a100_profiles.json and llama2_7b_step_time_nonattn.csv; docs/simulator.md says where each is
published. Prints the roofline's efficiencies (to be entered in perf/roofline.py) and its leave-one-out error.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.fit import Sample, fit
from slos_serve.perf.residuals import error_by_region, ratio_quantiles
from slos_serve.perf.roofline import DEVICES, FITTED, Device, Efficiency, ModelShape, kv_capacity_tokens, roofline
from slos_serve.perf.roofline import model_shape as shape_of

PROFILES = Path(__file__).resolve().parent.parent / "src" / "slos_serve" / "profiles"
CREATED = "2026-11-22T00:00:00+00:00"
MAX_BATCHED = 16384
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 95, 128, 192, 256)
DECODE_CONTEXTS = (128, 512, 1024, 2048)
PROMPTS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def opt(layers: int, hidden: int, heads: int) -> ModelShape:
    """Shape of an OPT model."""
    return shape_of(
        {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "ffn_dim": 4 * hidden,
            "vocab_size": 50272,
            "tie_word_embeddings": True,
        }
    )


LLAMA_7B = shape_of(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    }
)
LLAMA_8B = shape_of(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    }
)
OPT_13B, OPT_66B = opt(40, 5120, 40), opt(64, 9216, 72)
OPT_6_7B, OPT_30B = opt(32, 4096, 32), opt(48, 7168, 56)


@dataclass(frozen=True)
class Measured:
    """A profile that stands on measurements, and what the roofline needs to know of it."""

    name: str
    profile: Profile
    shape: ModelShape
    device: Device
    samples: list[Sample]
    attention_measured: bool


def main() -> None:
    """Write every profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data: Path = parser.parse_args().data
    PROFILES.mkdir(exist_ok=True)
    distserve = json.loads((data / "distserve_a100_profiles.json").read_text(encoding="utf-8"))
    measured = [
        from_distserve("opt-13b-a100", distserve, "facebook/opt-13b", OPT_13B, 1, "1,1"),
        from_distserve("opt-66b-a100-tp4", distserve, "facebook/opt-66b", OPT_66B, 4, "4,1"),
    ]
    extra = [
        from_distserve("opt-13b-a100-tp2", distserve, "facebook/opt-13b", OPT_13B, 2, "2,1"),
        from_distserve("opt-66b-a100-tp2", distserve, "facebook/opt-66b", OPT_66B, 2, "2,1"),
    ]
    attention = fitted(measured)
    vidur = data / "llama2_7b_step_time_nonattn.csv"
    measured += [from_vidur(f"llama-2-7b-{key}", vidur, key, attention) for key in ("a100", "h100")]
    everything = fitted(measured + extra)
    print("FITTED =", everything)
    errors = {}
    for one in measured:
        others = [other for other in measured + extra if other is not one]
        guess = roofline(one.shape, one.device, one.profile.tensor_parallel, fitted(others))
        error = error_by_region(guess, one.samples)["all"]
        errors[one.name] = f"{100 * error.median:.0f} % median, {100 * error.p90:.0f} % p90"
        print(f"{one.name}: fit {100 * one.profile.fit['all'].median:.1f} % median; left out: {errors[one.name]}")
        save_profile(one.profile, PROFILES / f"{one.name}.json")
    stated = "; ".join(f"{name} {error}" for name, error in errors.items())
    for label, model, shape, parallel in (
        ("opt-6.7b", "facebook/opt-6.7b", OPT_6_7B, 1),
        ("opt-30b", "facebook/opt-30b", OPT_30B, 2),
        ("toolllama-7b", "ToolBench/ToolLLaMA-2-7b-v2", LLAMA_7B, 1),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", LLAMA_8B, 1),
    ):
        for key, device in DEVICES.items():
            suffix = "" if parallel == 1 else f"-tp{parallel}"
            source = (
                "derived: roofline from model shape and data sheet (perf/roofline.py), efficiencies fitted on the "
                f"measured profiles; relative error of step times when each is left out: {stated}"
            )
            derived = profile_of(model, device, parallel, roofline(shape, device, parallel, everything), source)
            capacity = kv_capacity_tokens(shape, device, parallel)
            save_profile(replace(derived, kv_capacity_tokens=capacity), PROFILES / f"{label}-{key}{suffix}.json")
    if everything != FITTED:
        print("perf/roofline.py holds other efficiencies: enter those above")


def profile_of(model: str, device: Device, parallel: int, batch_time: BatchTimeModel, source: str) -> Profile:
    """A profile without error figures."""
    return Profile(
        model_name=model,
        device=device.name,
        engine="roofline" if source.startswith("derived") else "published fit",
        engine_version="n/a",
        created=CREATED,
        dtype="float16",
        tensor_parallel=parallel,
        kv_capacity_tokens=1,
        block_size=16,
        max_num_batched_tokens=MAX_BATCHED,
        model=batch_time,
        source=source,
    )


def with_errors(profile: Profile, samples: list[Sample]) -> Profile:
    """The profile with its error against the published curves."""
    quantiles = ratio_quantiles(profile.model, samples)
    return replace(profile, fit=error_by_region(profile.model, samples), residual_quantiles=quantiles)


def from_distserve(
    name: str, data: dict[str, dict[str, dict[str, dict[str, object]]]], model: str, shape: ModelShape, tp: int, kv: str
) -> Measured:
    """One batch-time model for the prefill and decode curves that DistServe fitted to its measurements."""
    curves: dict[str, list[float]] = data["distserve"][model][str(tp)]  # type: ignore[assignment]  # parsed JSON
    a, b, c = (value / 1000.0 for value in curves["prefill"])
    samples = [
        Sample(BatchShape(n * k, 0, n * n * k, 0), a + b * n * k + c * n * n * k, prefill_tokens=n * k)
        for n in PROMPTS
        for k in (1, 2, 4)
        if n * k <= 8192
    ]
    for batch in DECODE_BATCHES:
        small = batch <= curves["decoding_large_small_bs_threshold"]  # type: ignore[operator]  # a number
        a, b, c = (value / 1000.0 for value in curves["decoding_smallbs" if small else "decoding_largebs"])
        for context in DECODE_CONTEXTS:
            shape_ = BatchShape(batch, batch * context, 0, 0)
            samples.append(Sample(shape_, a + b * batch * context + c * batch))
    batch_time = fit(samples)
    source = (
        "DistServe's fits of its own engine on A100-80G, attention included (Apache-2.0, simdistserve), evaluated on a "
        f"grid of {len(samples)} batches and fitted again as one model; KV capacity from its max_num_tokens.csv"
    )
    capacity = int(data["kv_capacity_tokens"][model][kv])  # type: ignore[call-overload]  # parsed JSON
    profile = replace(profile_of(model, DEVICES["a100"], tp, batch_time, source), kv_capacity_tokens=capacity)
    return Measured(name, with_errors(profile, samples), shape, DEVICES["a100"], samples, True)


def from_vidur(name: str, path: Path, key: str, attention: Efficiency) -> Measured:
    """Measured linear layers; attention and output embedding from the roofline."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(int(row["num_tokens"]), float(row[f"{key}_ms"]) / 1000.0) for row in csv.DictReader(file)]
    samples = [Sample(BatchShape(tokens, 0, 0, 0), seconds, prefill_tokens=tokens) for tokens, seconds in rows]
    linear = fit(samples)
    device = DEVICES[key]
    model = roofline(LLAMA_7B, device, 1, attention)
    head_s = LLAMA_7B.embedding_parameters * LLAMA_7B.bytes_per_weight / 2 / (device.bandwidth * attention.weights)
    batch_time = replace(
        linear, b_c_s=linear.b_c_s + head_s, b_m_s=linear.b_m_s + head_s, k_ctx_s=model.k_ctx_s, k_q_s=model.k_q_s
    )
    source = (
        f"Vidur's measurements of Llama-2-7B linear layers on {key.upper()} (MIT), {len(rows)} batch sizes; attention "
        "(k_ctx, k_q) and output embedding added from the roofline with the efficiencies of the OPT profiles; "
        "scheduling and sampling are not in it. The error is of the linear layers. KV capacity computed from 0.9 of "
        "the memory"
    )
    profile = profile_of("meta-llama/Llama-2-7b-hf", device, 1, batch_time, source)
    profile = replace(profile, kv_capacity_tokens=kv_capacity_tokens(LLAMA_7B, device))
    errors = with_errors(replace(profile, model=linear), samples)
    profile = replace(profile, fit=errors.fit, residual_quantiles=errors.residual_quantiles)
    return Measured(name, profile, LLAMA_7B, device, samples, False)


def fitted(profiles: list[Measured]) -> Efficiency:
    """Geometric means over profiles of what each formula would need."""
    unit = Efficiency(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    rows = []
    for one in profiles:
        ideal = roofline(one.shape, one.device, one.profile.tensor_parallel, unit)
        real = one.profile.model
        doublings = (one.profile.tensor_parallel - 1).bit_length()
        rows.append((ideal, real, doublings, one.attention_measured))
    share, compute = tensor_parallel_share(rows)
    weights = geometric([i.b_m_s / r.b_m_s / share**d for i, r, d, _ in rows])
    attention = geometric([i.k_q_s / r.k_q_s / share**d for i, r, d, known in rows if known])
    kv_read = geometric([i.k_ctx_s / r.k_ctx_s / share**d for i, r, d, known in rows if known])
    ratio = float(np.mean([r.b_c_s / r.b_m_s for _, r, _, _ in rows if r.k_c_s]))
    slope = float(np.mean([r.k_m_s / r.k_c_s for _, r, _, _ in rows if r.k_c_s]))
    return Efficiency(*(round(x, 3) for x in (compute, weights, attention, kv_read, ratio, slope, share)))


def tensor_parallel_share(rows: list[tuple[BatchTimeModel, BatchTimeModel, int, bool]]) -> tuple[float, float]:
    """Least squares of log efficiency of compute over doublings: what a doubling leaves, and the efficiency at one."""
    doublings = np.array([row[2] for row in rows], dtype=float)
    logs = np.log([ideal.k_c_s / max(real.k_c_s, real.k_m_s) for ideal, real, _, _ in rows])
    if np.ptp(doublings) == 0:
        return FITTED.tp_share, float(np.exp(logs.mean())) / FITTED.tp_share ** float(doublings[0])
    slope, constant = np.polyfit(doublings, logs, 1)
    return float(np.exp(min(slope, 0.0))), float(np.exp(constant))


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


if __name__ == "__main__":
    main()
