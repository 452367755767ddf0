"""The identity of an engine from vLLM's resolved configuration: what is in it, and what a profile may show."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

vllm = pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from slos_serve.core.errors import ProfileMismatchError
from slos_serve.files.engine_identity import CONFIGURATION_FIELDS, EngineIdentity
from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.profiling.run import _shown
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.identity import check_profile, device_name, identity_of
from tests.builders import OPT_13B_A100

KEY = "sk-0123456789"


def identity(model: str, **given: object) -> EngineIdentity:
    options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, **given}
    return identity_of(EngineArgs(model=model, **options).create_engine_config())


@pytest.fixture
def snapshot(tmp_path: Path, cpu_model: str) -> str:
    """The model as the hub's cache has it."""
    folder = tmp_path / "models--org--small" / "snapshots"
    folder.mkdir(parents=True)
    (folder / "0a1b").symlink_to(cpu_model)
    return str(folder / "0a1b")


def test_every_field_is_known_and_told_apart(snapshot: str) -> None:
    plain = identity(snapshot)
    assert plain.known.keys() == set(EngineIdentity.__slots__)
    assert (plain.model, plain.device, plain.engine_version) == ("org/small", device_name(), vllm.__version__)
    assert (plain.quantization, plain.kv_cache_dtype, plain.speculation) == ("none", "float32", "none")
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    other = identity(snapshot, enforce_eager=False, max_num_seqs=4, dtype="bfloat16", speculative_config=drafts)
    assert (other.eager, other.max_num_seqs, other.dtype, other.kv_cache_dtype) == (False, 4, "bfloat16", "bfloat16")
    assert other.speculation == "ngram, 3 drafts"
    assert plain.fingerprint != other.fingerprint and plain.fingerprint == identity(snapshot).fingerprint


def test_a_far_profile_is_refused_and_a_near_one_told(
    snapshot: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = identity(snapshot)
    known = here.known
    profile = Profile(
        *("org/small", str(here.device), "vllm", str(here.engine_version), "now", "float32"),
        *(1, 4800, 32, int(here.max_num_batched_tokens or 0), OPT_13B_A100),
        configuration={**{name: known[name] for name in CONFIGURATION_FIELDS}, "max_num_seqs": 99},
    )
    path = tmp_path / "p.json"
    config = EngineArgs(
        model=snapshot, dtype="float32", max_model_len=256, max_num_seqs=8, enforce_eager=True
    ).create_engine_config()
    save_profile(profile, path)
    with caplog.at_level(logging.WARNING, "vllm.slos_serve"):
        logging.getLogger("vllm.slos_serve").addHandler(caplog.handler)
        check_profile(PluginConfig(profile_path=path), config)
        assert "max_num_seqs is 8 here and 99 in the profile" in caplog.text
        save_profile(replace(profile, device="another"), path)
        with pytest.raises(ProfileMismatchError, match="device"):
            check_profile(PluginConfig(profile_path=path), config)
        check_profile(PluginConfig(profile_path=path, allow_profile_mismatch=True), config)
        logging.getLogger("vllm.slos_serve").removeHandler(caplog.handler)
    assert "device is" in caplog.text
    check_profile(PluginConfig(), config)


def test_a_profile_shows_the_engines_arguments_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", KEY)
    given = ["--max-num-seqs", "8", "--api-key", "a", KEY, "--port", "1", "--ssl-keyfile=/home/me/k.pem"]
    assert (
        _shown([*given, "--hf-token", KEY, "--load-format", KEY]) == "--max-num-seqs 8 --hf-token *** --load-format ***"
    )
    assert _shown(["--port", "1"]) == "none"
