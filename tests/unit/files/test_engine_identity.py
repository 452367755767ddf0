"""Which engines a profile may be used for: equal, near with a warning, far not at all."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from slos_serve.core.errors import InvalidFieldError, ProfileMismatchError
from slos_serve.files.engine_identity import (
    CONFIGURATION_FIELDS,
    FIRST_FIELDS,
    EngineIdentity,
    differences,
    model_label,
)
from slos_serve.files.profile_file import Profile, default_profile_path, find_profile, load_profile, save_profile
from tests.builders import OPT_13B_A100

ENGINE = EngineIdentity(
    model="org/model",
    device="NVIDIA H100",
    engine_version="0.32.1",
    dtype="bfloat16",
    tensor_parallel=2,
    pipeline_parallel=1,
    data_parallel=1,
    expert_parallel=False,
    quantization="none",
    kv_cache_dtype="bfloat16",
    eager=False,
    model_runner="V2",
    speculation="none",
    max_num_batched_tokens=2048,
    max_num_seqs=256,
    async_scheduling=True,
)


def profile_of(engine: EngineIdentity) -> Profile:
    known = engine.known
    return Profile(
        model_name=str(engine.model),
        device=str(engine.device),
        engine="vllm",
        engine_version=str(engine.engine_version),
        created="now",
        dtype=str(engine.dtype),
        tensor_parallel=int(engine.tensor_parallel or 1),
        kv_capacity_tokens=1000,
        block_size=16,
        max_num_batched_tokens=int(engine.max_num_batched_tokens or 1),
        model=OPT_13B_A100,
        configuration={name: known[name] for name in CONFIGURATION_FIELDS if name in known},
    )


def test_every_field_is_kept_in_a_profile(tmp_path: Path) -> None:
    assert {*FIRST_FIELDS, *CONFIGURATION_FIELDS} == {field.name for field in fields(EngineIdentity)}
    save_profile(profile_of(ENGINE), tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json").identity == ENGINE
    assert load_profile(tmp_path / "p.json").check_matches(ENGINE) == []


FAR = [
    ("model", "org/other"),
    ("device", "NVIDIA H200"),
    ("engine_version", "0.33.0"),
    ("engine_version", "unknown"),
    ("dtype", "float16"),
    ("tensor_parallel", 4),
    ("pipeline_parallel", 2),
    ("expert_parallel", True),
    ("quantization", "fp8"),
    ("kv_cache_dtype", "fp8_e4m3"),
    ("eager", True),
    ("model_runner", "V1"),
    ("speculation", "eagle3, 3 drafts"),
    ("max_num_batched_tokens", 8193),
]


@pytest.mark.parametrize(("name", "value"), FAR)
def test_a_far_engine_is_refused_by_field_unless_that_is_allowed(name: str, value: Any) -> None:
    engine = replace(ENGINE, **{name: value})
    with pytest.raises(ProfileMismatchError) as caught:
        profile_of(ENGINE).check_matches(engine)
    assert f"{name} is {value!r} here and {getattr(ENGINE, name)!r} in the profile" in str(caught.value)
    assert "--allow-profile-mismatch" in str(caught.value)
    (found,) = profile_of(ENGINE).check_matches(engine, allow_mismatch=True)
    assert (found.field, found.far) == (name, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("engine_version", "0.32.0"),
        ("engine_version", "0.32.2+cu130"),
        ("max_num_seqs", 64),
        ("max_num_batched_tokens", 512),
        ("max_num_batched_tokens", 8192),
        ("data_parallel", 4),
        ("async_scheduling", False),
        ("speculation", "ngram, 4 drafts"),
    ],
)
def test_a_near_engine_is_told_about(name: str, value: Any) -> None:
    (found,) = profile_of(ENGINE).check_matches(replace(ENGINE, **{name: value}))
    assert (found.field, found.far) == (name, False)
    assert str(found) == f"{name} is {value!r} here and {getattr(ENGINE, name)!r} in the profile"


def test_ranks_that_exchange_experts_must_be_as_many() -> None:
    here = replace(ENGINE, expert_parallel=True, data_parallel=4)
    with pytest.raises(ProfileMismatchError, match="data_parallel"):
        profile_of(replace(ENGINE, expert_parallel=True)).check_matches(here)


def test_what_an_old_profile_does_not_say_is_near() -> None:
    old = replace(profile_of(ENGINE), configuration={})
    found = old.check_matches(ENGINE)
    assert {one.field for one in found} == set(CONFIGURATION_FIELDS) and not any(one.far for one in found)
    assert str(next(one for one in found if one.field == "quantization")) == (
        "quantization is 'none' here and unknown in the profile"
    )
    assert differences(EngineIdentity(), EngineIdentity()) == []


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "src" / "slos_serve" / "profiles").glob("*.json")))
def test_shipped_profiles_load(path: Path) -> None:
    profile = load_profile(path)
    assert profile.check_matches(profile.identity) == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("eager", 1, "type bool"), ("max_num_seqs", True, "type int"), ("colour", "red", "one of")],
)
def test_a_configuration_that_cannot_be_used_is_named(tmp_path: Path, name: str, value: Any, said: str) -> None:
    broken = replace(profile_of(ENGINE), configuration={name: value})
    save_profile(broken, tmp_path / "p.json")
    with pytest.raises(InvalidFieldError, match=rf"p\.json: configuration.*{said}"):
        load_profile(tmp_path / "p.json")


def test_a_hub_name_and_its_snapshot_are_the_same_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--some-model" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    for given in (snapshot, f"{snapshot}/", tmp_path / "link"):
        assert model_label(str(given)) == "org/some-model"
    assert model_label("/absent/models--gpt2/snapshots/ff") == "gpt2"
    assert model_label("org/some-model") == "org/some-model"


def test_the_nearest_kept_profile_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_SERVE_CACHE", str(tmp_path))
    patched = replace(ENGINE, engine_version="0.32.0")
    farther = replace(patched, max_num_seqs=8)
    for engine in (replace(ENGINE, quantization="fp8"), farther, patched):
        save_profile(profile_of(engine), default_profile_path(engine))
    (tmp_path / "profiles" / "broken.json").write_text("{")
    found = find_profile(ENGINE)
    assert found is not None and found[0] == default_profile_path(patched)
    save_profile(profile_of(ENGINE), default_profile_path(ENGINE))
    found = find_profile(ENGINE)
    assert found is not None and found[1].identity == ENGINE
    assert find_profile(replace(ENGINE, dtype="float16")) is None
