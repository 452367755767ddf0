"""The plug-in's configuration survives the environment, and what cannot be used is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from slos_serve.core.errors import InvalidFieldError
from slos_serve.vllm_plugin.config import (
    ENV_OF_FIELD,
    PLUGIN_KEYS,
    PluginConfig,
    without_file_variables,
)


def test_what_the_environment_carries_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("classes: {fast: {tpot_ms: 5}}", encoding="utf-8")
    config = PluginConfig(
        classes_path=Path("c.yaml"),
        publish_to="ipc:///x",
        ttft_margin_ms=2.5,
        fault_limit=3,
        allow_profile_mismatch=True,
    )
    told = config.environment()
    assert told == {
        "SLOS_SERVE_ALLOW_PROFILE_MISMATCH": "1",
        "SLOS_SERVE_CLASSES": str(tmp_path / "c.yaml"),
        "SLOS_SERVE_FAULT_LIMIT": "3",
        "SLOS_SERVE_PUBLISH": "ipc:///x",
        "SLOS_SERVE_TTFT_MARGIN_MS": "2.5",
    }
    found = PluginConfig.from_environment({**told, "PATH": "p"})
    assert [slo_class.name for slo_class in found.classes] == ["fast"]
    assert (found.planner.ttft_margin_s, found.fault_limit, found.allow_profile_mismatch) == (0.0025, 3, True)
    kept = without_file_variables({**told, "PATH": "p"})
    assert kept == {**{name: told[name] for name in told if name != "SLOS_SERVE_CLASSES"}, "PATH": "p"}


def test_nothing_given_is_the_default_and_says_nothing() -> None:
    config = PluginConfig.from_environment({"SLOS_SERVE_CLASSES": "", "SLOS_SERVE_PLAN_LIMIT_MS": ""})
    assert config == PluginConfig() and config.environment() == {}
    assert config.profile is None and len(config.classes) == 0
    assert (config.plan_limit_s, config.publish_every_s, config.max_body_bytes) == (0.01, 0.1, 4 * 2**20)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("SLOS_SERVE_PLAN_LIMIT_MS", "soon", "milliseconds, 0 to 60000"),
        ("SLOS_SERVE_TTFT_MARGIN_MS", "-1", "milliseconds, 0 to 60000"),
        ("SLOS_SERVE_PUBLISH_EVERY_MS", "nan", "milliseconds, 0 to 60000"),
        ("SLOS_SERVE_FAULT_LIMIT", "0", "a whole number, 1 to 1000000"),
        ("SLOS_SERVE_ALLOW_PROFILE_MISMATCH", "perhaps", "0 or 1"),
        ("SLOS_SERVE_CLASSES", "/nonexistent.yaml", "class file"),
        ("SLOS_SERVE_PROFILE", "/nonexistent.json", "JSON file"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(name: str, value: str, allowed: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        PluginConfig.from_environment({name: value})
    assert allowed in str(caught.value)
    assert value in str(caught.value)
    if not value.startswith("/"):
        assert caught.value.field == name


def test_it_cannot_be_changed_and_takes_no_other_field() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PluginConfig().fault_limit = 5
    with pytest.raises(InvalidFieldError, match="'slow'"):
        PluginConfig.of({"classes": "slow"})


def test_the_profile_can_be_replaced(tmp_path: Path) -> None:
    config = PluginConfig(ttft_margin_ms=1.0)
    assert config.profile is None
    assert config.with_profile(tmp_path).profile_path == tmp_path
    assert config.with_profile(tmp_path).ttft_margin_ms == 1.0


def test_names_cover_the_fields() -> None:
    assert set(ENV_OF_FIELD) == set(PluginConfig.model_fields)
    assert set(PLUGIN_KEYS) == set(PluginConfig.model_fields) - {"publish_to", "front_end"}
