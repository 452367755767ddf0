"""The application's configuration: what a Serve YAML and the command line may say."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")
pytest.importorskip("vllm")

from ray.serve._private.common import DeploymentID
from starlette.testclient import TestClient

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.launch.endpoint import Endpoint
from slos_serve.launch.serve_config import ServeConfig
from slos_serve.ray_serve.app import KEYS, AppConfig, build_app, fastapi_app_with, llm_config_of
from slos_serve.ray_serve.curve import CurveKeys
from slos_serve.ray_serve.run import app_args, check_endpoint, http_options
from slos_serve.vllm_plugin.config import PluginConfig
from tests.builders import OPT_13B_A100

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
KEYS_OF_CLUSTER = CurveKeys.make()
DEPLOYMENT = DeploymentID(name="engine", app_name="app")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    save_profile(Profile("m", "d", "vllm", "1", "now", "float32", 1, 64_000, 16, 2048, OPT_13B_A100), path)
    return path


def arguments(profile: Path, **given: Any) -> dict[str, Any]:
    config = {"model_loading_config": {"model_id": "m", "model_source": str(profile.parent)}}
    return {"llm_config": config, "profile": str(profile), **given}


def test_what_is_given_stays_and_ours_is_filled_in(profile: Path) -> None:
    args = arguments(profile, order="pack", stale_after_ms=500)
    args["llm_config"]["engine_kwargs"] = {"max_model_len": 99, "scheduler_cls": "other"}
    args["llm_config"]["deployment_config"] = {"num_replicas": 3, "health_check_period_s": 4}
    config = llm_config_of(AppConfig.of_args(args), 6, {"A": "b"})
    assert config["engine_kwargs"] == {"max_model_len": 99, "scheduler_cls": "slos_serve.vllm_plugin.SLOScheduler"}
    deployment = config["deployment_config"]
    assert (deployment["num_replicas"], deployment["health_check_period_s"]) == (3, 4)
    assert deployment["request_router_config"]["request_router_kwargs"] == {
        "num_classes": 6,
        "order": "pack",
        "stale_after_s": 0.5,
    }
    assert config["runtime_env"]["env_vars"]["A"] == "b"
    assert args["llm_config"]["engine_kwargs"]["scheduler_cls"] == "other", "what was given is not written to"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"stale": 1}, "args"),
        ({"order": "best"}, "order"),
        ({"publish_every_ms": -1}, "publish_every_ms"),
        ({"ingress_replicas": 0}, "ingress_replicas"),
        ({"llm_config": None}, "llm_config"),
        ({"llm_config": {}}, "model_id"),
        ({"classes": "/nonexistent.yaml"}, "class file"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_starts(
    profile: Path, given: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidFieldError, match=field):
        build_app({**arguments(profile), **given})


def test_a_profile_is_asked_for(profile: Path) -> None:
    args = arguments(profile)
    del args["profile"]
    with pytest.raises(InvalidFieldError, match="slos-serve profile"):
        build_app(args)


def test_the_plan_of_the_command_line(tmp_path: Path) -> None:
    plan = ServeConfig(
        model="/models/m",
        replicas=2,
        vllm_args=("--max-num-seqs", "8"),
        plugin=PluginConfig(profile_path=Path("/p.json"), ttft_margin_ms=5.0),
    )
    plan.write(tmp_path / "plan.json")
    assert ServeConfig.read(tmp_path / "plan.json") == plan
    args = app_args(plan, {"max_num_seqs": 8, "served_model_name": ["short"], "port": 8000})
    assert args == {
        "llm_config": {
            "model_loading_config": {"model_id": "short", "model_source": "/models/m"},
            "engine_kwargs": {"max_num_seqs": 8},
            "deployment_config": {"num_replicas": 2},
        },
        "order": "prefix",
        "profile": "/p.json",
        "ttft_margin_ms": 5.0,
    }


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"api_key": ["sk-1"]}, "set VLLM_API_KEY in the environment"),
        ({"ssl_keyfile": "k"}, "http_options"),
        ({"root_path": "/x"}, "proxy in front"),
        ({"enable_request_id_headers": True}, "HTTP side"),
    ],
)
def test_front_end_arguments_of_a_yaml_are_refused(profile: Path, kwargs: dict[str, Any], said: str) -> None:
    args = arguments(profile)
    args["llm_config"]["engine_kwargs"] = kwargs
    with pytest.raises(InvalidFieldError, match=said) as caught:
        build_app(args)
    assert "llm_config.engine_kwargs" in str(caught.value) and "sk-1" not in str(caught.value)


def test_replicas_refuse_front_end_arguments_of_the_command_line() -> None:
    config = ServeConfig(model="/models/m", replicas=2)
    given = {"api_key": ["sk-1"], "ssl_keyfile": "k", "host": "h", "config": "c", "max_num_seqs": 8}
    assert app_args(config, given)["llm_config"]["engine_kwargs"] == {"max_num_seqs": 8}
    with pytest.raises(InvalidFieldError, match="--root-path"):
        app_args(config, {**given, "root_path": "/x"})


def test_the_endpoints_options() -> None:
    assert http_options(Endpoint()) == {"host": "0.0.0.0", "port": 8000, "request_timeout_s": None}
    tls = Endpoint(host="10.0.0.5", port=443, ssl_certfile="c", ssl_keyfile="k", ssl_ca_certs="a")
    assert http_options(tls) == {
        "host": "10.0.0.5",
        "port": 443,
        "request_timeout_s": None,
        "ssl_certfile": "c",
        "ssl_keyfile": "k",
        "ssl_ca_certs": "a",
    }
    with pytest.raises(InvalidFieldError, match="together with --ssl-certfile"):
        http_options(Endpoint(ssl_certfile="c"))


def test_a_cluster_whose_endpoint_is_another_is_refused() -> None:
    wanted = http_options(Endpoint(ssl_certfile="c", ssl_keyfile="k"))
    check_endpoint(wanted, SimpleNamespace(port=8000, ssl_certfile="c", ssl_keyfile="k"))
    with pytest.raises(InvalidFieldError, match="--ssl-certfile"):
        check_endpoint(wanted, SimpleNamespace(port=8000, ssl_certfile=None, ssl_keyfile=None))
    with pytest.raises(InvalidFieldError, match="--port"):
        check_endpoint(wanted, SimpleNamespace(port=9000, ssl_certfile="c", ssl_keyfile="k"))


def test_the_application_asks_for_a_key_before_it_reads_a_body() -> None:
    body = b'{"vllm_xargs": {"slo_class": "no such class"}}'
    for keys, wanted in ((("sk-1",), 401), ((), 400)):
        client = TestClient(fastapi_app_with(keys, AppConfig(llm_config={}, max_request_mib=0.001)))
        headers = {"content-type": "application/json"}
        assert client.post("/v1/completions", content=body, headers=headers).status_code == wanted
        headers["authorization"] = "Bearer sk-1"
        assert client.post("/v1/completions", content=body, headers=headers).status_code == 400
        assert client.post("/v1/completions", content=b" " * 2000, headers=headers).status_code == 413


def test_the_example_and_the_page_agree_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = yaml.safe_load((ROOT / "examples" / "serve.yaml").read_text(encoding="utf-8"))["applications"][0]
    settings = AppConfig.of_args(given["args"])
    assert given["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
    assert settings.plugin.classes_path is not None and settings.plugin.classes_path.is_file()
    page = (ROOT / "docs" / "ray-serve.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE))
    assert listed | {"llm_config"} == set(KEYS)


def test_an_update_starts_the_new_endpoint_before_it_stops_the_old_one(profile: Path) -> None:
    """With one endpoint Ray would stop it first, and all requests would wait until the new one has started."""
    deployment = build_app(arguments(profile))._bound_deployment
    assert deployment.name == "SLOIngress" and deployment._deployment_config.max_surge_percent == 100
