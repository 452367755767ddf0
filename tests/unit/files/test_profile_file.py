"""Profiles survive the disk, and what cannot be used is refused with file and field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slos_serve.core.errors import InvalidFieldError, ProfileMismatchError
from slos_serve.files.engine_identity import EngineIdentity, model_label
from slos_serve.files.profile_file import (
    Profile,
    default_profile_path,
    find_profile,
    load_profile,
    load_samples,
    samples_path,
    save_profile,
    save_samples,
)
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.fit import Sample
from slos_serve.perf.residuals import RegionError

PROFILE = Profile(
    model_name="smollm2",
    device="Some CPU, 2 cores",
    engine="vllm",
    engine_version="0.32.0",
    created="2026-01-02T03:04:05+00:00",
    dtype="bfloat16",
    tensor_parallel=1,
    kv_capacity_tokens=90_000,
    block_size=128,
    max_num_batched_tokens=2048,
    model=BatchTimeModel(1e-3, 2e-2, 5e-4, 3e-2, 1e-6, 2e-8, 3e-3),
    residual_quantiles={0.5: 1.0, 0.9: 1.08, 0.99: 1.2},
    fit={"all": RegionError(40, 0.02, 0.06, 0.001, 0.99), "mixed": RegionError(2, 0.02, 0.06, 0.0, None)},
    source="test",
)
ENGINE = EngineIdentity("smollm2", "Some CPU, 2 cores", "0.32.0", "bfloat16", 1, max_num_batched_tokens=2048)
SAMPLES = [Sample(BatchShape(3, 40, 0, 3), 0.05), Sample(BatchShape(64, 10, 5376, 1), 0.123456, prefill_tokens=64)]


def record(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "whole.json"
    save_profile(PROFILE, path)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "p.json"
    save_profile(PROFILE, path, SAMPLES)
    assert load_profile(path) == PROFILE
    assert load_samples(samples_path(path)) == SAMPLES
    assert samples_path(path).name == "p.samples.csv"


def test_saving_leaves_no_other_files(tmp_path: Path) -> None:
    save_profile(PROFILE, tmp_path / "p.json")
    save_profile(replace(PROFILE, source="again"), tmp_path / "p.json")
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert load_profile(tmp_path / "p.json").source == "again"


def test_the_file_has_the_documented_keys(tmp_path: Path) -> None:
    saved = record(tmp_path)
    assert saved["format"] == "slos-serve-profile/1"
    assert saved["model"] == "smollm2"
    assert set(saved["batch_time"]) == {"k_c_s", "b_c_s", "k_m_s", "b_m_s", "k_ctx_s", "k_q_s", "k_seq_s", "k_s_s"}
    assert saved["residual_quantiles"] == {"0.5": 1.0, "0.9": 1.08, "0.99": 1.2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "slos-serve-profile/9"),
        ("model", 5),
        ("device", None),
        ("kv_capacity_tokens", 0),
        ("kv_capacity_tokens", True),
        ("block_size", "16"),
        ("tensor_parallel", 1.5),
        ("max_num_batched_tokens", -1),
        ("batch_time", []),
        ("residual_quantiles", {"2": 1.0}),
        ("residual_quantiles", {"x": 1.0}),
        ("residual_quantiles", {"0.9": 0}),
        ("fit", {"all": {"median": 1}}),
        ("fit", {"all": 3}),
    ],
)
def test_a_bad_field_is_named_with_its_file(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(record(tmp_path) | {field: value}))
    with pytest.raises(InvalidFieldError, match=field) as caught:
        load_profile(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("value", [-1.0, "1", None, float("nan"), 1e400])
def test_a_bad_coefficient_is_named(tmp_path: Path, value: object) -> None:
    bad = record(tmp_path)
    bad["batch_time"]["k_ctx_s"] = value
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(InvalidFieldError, match=r"bad\.json: batch_time\.k_ctx_s"):
        load_profile(path)


def test_a_model_without_slope_is_refused_with_the_file(tmp_path: Path) -> None:
    bad = record(tmp_path)
    bad["batch_time"] |= {"k_c_s": 0.0, "k_m_s": 0.0}
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(InvalidFieldError, match=r"bad\.json: batch_time\.k_c_s"):
        load_profile(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "no.json"
    path.write_text(text)
    with pytest.raises(InvalidFieldError, match="profile file"):
        load_profile(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidFieldError, match=r"absent\.json"):
        load_profile(tmp_path / "absent.json")


def test_a_match_passes_and_what_the_engine_does_not_say_is_not_compared() -> None:
    assert PROFILE.check_matches(EngineIdentity()) == []
    assert PROFILE.check_matches(ENGINE) == []


def test_a_mismatch_says_everything_that_differs() -> None:
    other = EngineIdentity(model="other", device="Some CPU, 2 cores", engine_version="0.33.0")
    with pytest.raises(ProfileMismatchError) as caught:
        PROFILE.check_matches(other)
    message = str(caught.value)
    assert "model is 'other' here and 'smollm2' in the profile" in message
    assert "engine_version is '0.33.0' here and '0.32.0' in the profile" in message
    assert "device" not in message.split("Measure", maxsplit=1)[0]


def test_a_local_model_goes_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert model_label(str(folder)) == "my-model"
    assert model_label(f"{folder}/") == "my-model"
    assert model_label("org/hub-model") == "org/hub-model"


def test_find_profile_finds_the_kept_one_and_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_SERVE_CACHE", str(tmp_path))
    assert find_profile(ENGINE) is None
    path = default_profile_path(ENGINE)
    save_profile(PROFILE, path)
    assert find_profile(ENGINE) == (path, PROFILE)
    assert find_profile(replace(ENGINE, engine_version="0.33.0")) is None
    save_profile(replace(PROFILE, device="Another"), path)
    assert find_profile(ENGINE) is None


def test_a_path_keeps_models_apart_and_stays_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_SERVE_CACHE", str(tmp_path))
    engine = EngineIdentity("../../org/m", "GPU / X", "1", "float16", 1)
    path = default_profile_path(engine)
    assert path.parent == tmp_path / "profiles"
    assert path != default_profile_path(replace(engine, tensor_parallel=2))
    assert path != default_profile_path(replace(engine, quantization="fp8"))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("1,2,3", "columns"),
        ("1,2,0,1,0,0,0,x", "duration_s"),
        ("1,2,0,1,0,0,0,-1", "duration_s"),
        ("1,-2,0,1,0,0,0,0.1", "context_tokens"),
        ("0,2,0,1,0,0,0,0.1", "new_tokens"),
    ],
)
def test_a_bad_sample_is_named_with_its_line(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "s.csv"
    save_samples(SAMPLES, path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InvalidFieldError, match=rf"line 4: {named}"):
        load_samples(path)


def test_samples_with_another_header_or_no_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InvalidFieldError, match="header"):
        load_samples(path)
    with pytest.raises(InvalidFieldError, match="samples file"):
        load_samples(tmp_path / "absent.csv")


def test_samples_keep_their_drafts_and_older_files_are_read(tmp_path: Path) -> None:
    """Review, A5: samples lost their drafts, which cost a row of sampling each."""
    samples = [
        Sample(BatchShape(12, 900, 0, 3, 4, 9), 0.02),
        Sample(BatchShape(50, 0, 2500, 1), 0.03, prefill_tokens=50),
    ]
    save_samples(samples, tmp_path / "new.csv")
    assert load_samples(tmp_path / "new.csv") == samples
    header = "new_tokens,context_tokens,quad_tokens2,num_seqs,draft_steps,prefill_tokens,duration_s"
    (tmp_path / "old.csv").write_text(f"{header}\n50,0,2500,1,0,50,0.03\n", encoding="utf-8")
    assert load_samples(tmp_path / "old.csv") == samples[1:]
