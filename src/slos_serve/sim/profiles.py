"""Profiles that a simulation runs on: shipped ones by short name, others by path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.profile_file import Profile, load_profile
from slos_serve.sim.limits import EngineLimits

# KV bytes a token (2 * layers * KV width * 2 bytes), for the transfer between prefill and decode replicas.
KV_BYTES_PER_TOKEN = {
    "facebook/opt-6.7b": 524_288.0,
    "facebook/opt-13b": 819_200.0,
    "facebook/opt-30b": 1_376_256.0,
    "facebook/opt-66b": 2_359_296.0,
    "meta-llama/Llama-2-7b-hf": 524_288.0,
    "meta-llama/Llama-3.1-8B": 131_072.0,
    "ToolBench/ToolLLaMA-2-7b-v2": 524_288.0,
    "smollm2-135m-instruct-0.1.2-c1": 46_080.0,
}
UNKNOWN_KV_BYTES = 524_288.0


def profile_names() -> list[str]:
    """Short names of the shipped profiles."""
    folder = resources.files("slos_serve") / "profiles"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def find_profile(name: str) -> Profile:
    """A shipped profile by name, or one from a file.

    Raises:
        InvalidFieldError: neither, with the list of shipped ones; or a file that cannot be used.
    """
    if name in profile_names():
        with resources.as_file(resources.files("slos_serve") / "profiles" / f"{name}.json") as path:
            return load_profile(path)
    path = Path(name)
    if path.is_file():
        return load_profile(path)
    raise InvalidFieldError("profile", name, f"a profile file, or one of {profile_names()}")


def limits_of(profile: Profile, max_num_seqs: int = 256, prefix_cache: bool = True) -> EngineLimits:
    """Engine limits that a profile implies."""
    return EngineLimits(
        kv_capacity_tokens=profile.kv_capacity_tokens,
        block_size=profile.block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        prefix_cache=prefix_cache,
    )


def kv_bytes_per_token(profile: Profile) -> float:
    """KV bytes a token of the profile's model; that of a 7B Llama when the model is not known."""
    return KV_BYTES_PER_TOKEN.get(profile.model_name, UNKNOWN_KV_BYTES)
