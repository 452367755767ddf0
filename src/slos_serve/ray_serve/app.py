"""The Serve application: one OpenAI endpoint in front of replicas that plan.

``import_path: slos_serve.ray_serve.app:build_app`` in a Serve YAML, or :func:`build_app` from Python. The engine
deployment is Ray Serve LLM's with our server class; the endpoint is Ray Serve LLM's with the middleware around it
(docs/decisions.md says why ``build_openai_app`` does not do).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import make_fastapi_ingress

from slos_serve.core.errors import InvalidFieldError
from slos_serve.launch.cpu_engine import CPU_ENVIRONMENT, cpu_engine_kwargs
from slos_serve.launch.cpu_model import resolve_model
from slos_serve.launch.server import SCHEDULER_CLS
from slos_serve.ray_serve import compat
from slos_serve.ray_serve.api_keys import ApiKeyRequired, take_keys
from slos_serve.ray_serve.arguments import engine_arguments
from slos_serve.ray_serve.bounds import MAX_REQUEST_MIB, MAX_REQUESTS, Bounds
from slos_serve.ray_serve.engine import NothingToDownload
from slos_serve.ray_serve.ingress import SLOIngress
from slos_serve.ray_serve.json_only import JsonOnly
from slos_serve.ray_serve.ports import DEFAULT_PORTS, PORTS_ENV, PortRange
from slos_serve.ray_serve.server import HANG_AFTER_S, HANG_ENV, SLOServer
from slos_serve.routing.settings import STALE_AFTER_S, Order
from slos_serve.vllm_plugin.api_keys import KeyDigests
from slos_serve.vllm_plugin.config import PLUGIN_KEYS, PluginConfig, invalid_field
from slos_serve.vllm_plugin.live.routes import PAGE_PATH, STATE_PATH
from slos_serve.vllm_plugin.middleware import SLOMiddleware

ROUTER_CLASS = "slos_serve.ray_serve.router:SLORequestRouter"
ENDPOINTS = {
    **compat.DEFAULT_ENDPOINTS,
    "health": lambda app: app.get("/health"),
    "slo": lambda app: app.get(PAGE_PATH),
    "plugin_metrics": lambda app: app.get("/metrics"),
    "slo_state": lambda app: app.get(STATE_PATH),
}
# Streams that run when a replica is to go (scaling down, a new version) may end first.
DRAIN_S = 600.0
MOST_ONGOING = 100_000
_DAY_MS = 86_400_000.0


class AppConfig(BaseModel):
    """What the application adds to Ray's own settings.

    Attributes:
        llm_config: as of ``ray.serve.llm.LLMConfig``.
        plugin: the plug-in's configuration; in a Serve YAML its keys stand beside the others.
        order: whom the router asks first.
        stale_after_ms: a replica that has not published for this long counts as full.
        hang_after_s: a replica whose requests wait this long for a step is replaced.
        ingress_replicas: endpoints; each routes by its own picture of the replicas.
        publish_ports: range that each replica takes the port from that routers hear it at.
        max_request_mib: largest body of any request, in MiB.
        max_requests: requests in progress at one endpoint; more are answered 503.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    llm_config: dict[str, Any] = Field(description="a mapping, as of ray.serve.llm.LLMConfig")
    plugin: PluginConfig = PluginConfig()
    order: Order = Field(default=Order.PREFIX, description=f"one of {[order.value for order in Order]}")
    stale_after_ms: float = Field(
        default=STALE_AFTER_S * 1000.0, gt=0.0, le=_DAY_MS, description="milliseconds, above 0"
    )
    hang_after_s: float = Field(default=HANG_AFTER_S, gt=0.0, le=_DAY_MS, description="seconds, above 0")
    ingress_replicas: int = Field(default=1, ge=1, le=10_000, description="a whole number, 1 to 10000")
    publish_ports: str = Field(default=DEFAULT_PORTS, description="a range of ports such as 29500-29999")
    max_request_mib: float = Field(default=MAX_REQUEST_MIB, gt=0.0, le=4096.0, description="MiB, above 0")
    max_requests: int = Field(default=MAX_REQUESTS, ge=1, le=MOST_ONGOING, description="a whole number, at least 1")

    @classmethod
    def of_args(cls, args: Mapping[str, Any]) -> Self:
        """Read the ``args`` of a Serve YAML.

        Raises:
            InvalidFieldError: a key is unknown or missing, or its value cannot be used.
        """
        unknown = sorted(set(args) - set(KEYS))
        if unknown:
            raise InvalidFieldError("args", unknown[0], f"one of {list(KEYS)}")
        if not args.get("profile"):
            raise InvalidFieldError(
                "profile", None, "a batch-time profile's path; `slos-serve profile MODEL` makes one"
            )
        plugin = PluginConfig.of({field: args.get(key) for field, key in PLUGIN_KEYS.items()}, PLUGIN_KEYS)
        own = {key: value for key, value in args.items() if key not in PLUGIN_KEYS.values()}
        if not isinstance(own.get("llm_config"), Mapping):
            raise InvalidFieldError("llm_config", own.get("llm_config"), "a mapping, as of ray.serve.llm.LLMConfig")
        try:
            return cls(plugin=plugin, **own)
        except ValidationError as fault:
            raise invalid_field(fault, cls) from None


KEYS = (*(name for name in AppConfig.model_fields if name != "plugin"), *PLUGIN_KEYS.values())


def build_app(args: dict[str, Any], api_keys: Sequence[str] | None = None) -> Application:
    """The application of a Serve YAML's ``args``; see :class:`AppConfig` and docs/ray-serve.md.

    Args:
        args: the settings.
        api_keys: keys that requests must bring one of; ``None`` takes those of this process's environment
            (``VLLM_API_KEY``). The application holds their digests only.

    Raises:
        InvalidFieldError: an argument, the class file or the profile cannot be used.
    """
    config = AppConfig.of_args(args)
    PortRange.of_text(config.publish_ports)
    _ = config.plugin.classes, config.plugin.profile  # unusable files are refused here and not by each replica
    keys = take_keys(os.environ) if api_keys is None else tuple(api_keys)
    environment = {
        **config.plugin.environment(),
        HANG_ENV: f"{config.hang_after_s:g}",
        PORTS_ENV: config.publish_ports,
    }
    llm = LLMConfig(**llm_config_of(config, len(config.plugin.classes) + 2, environment))
    engine = build_llm_deployment(llm)
    ingress = serve.deployment(
        make_fastapi_ingress(SLOIngress, endpoint_map=ENDPOINTS, app=fastapi_app_with(keys, config)),
        name="SLOIngress",
        num_replicas=config.ingress_replicas,
        # An update starts the new endpoint before it stops the old one: without an endpoint all requests would wait.
        max_surge_percent=100,
        max_ongoing_requests=MOST_ONGOING,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": dict(llm.runtime_env["env_vars"])}},
    )
    return ingress.bind(
        llm_deployments={llm.model_id: engine},
        model_cards={llm.model_id: compat.to_model_metadata(llm.model_id, llm)},
        tokenizer=str(llm.model_loading_config.tokenizer_source or model_source_of(llm)),
        max_model_len=llm.engine_kwargs.get("max_model_len"),
        trust_remote_code=bool(llm.engine_kwargs.get("trust_remote_code", False)),
    )


def fastapi_app_with(keys: Sequence[str], config: AppConfig) -> Any:
    """Ray's FastAPI application in our middleware; the one added last is asked first."""
    app = compat.fastapi_app()
    app.add_middleware(SLOMiddleware)
    app.add_middleware(JsonOnly)
    app.add_middleware(Bounds, max_bytes=int(config.max_request_mib * 2**20), max_requests=config.max_requests)
    if keys:
        app.add_middleware(ApiKeyRequired, keys=KeyDigests.of(keys))
    return app


def llm_config_of(settings: AppConfig, num_classes: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """Ray's configuration with ours filled in; what is given there stays, but for scheduler, server and router."""
    config: dict[str, Any] = copy.deepcopy(dict(settings.llm_config))
    loading = dict(config.get("model_loading_config") or {})
    if "model_id" not in loading:
        raise InvalidFieldError("llm_config.model_loading_config.model_id", None, "the name that clients use")
    named = str(loading.get("model_source") or loading["model_id"])
    loading["model_source"] = resolve_model(named)
    config["model_loading_config"] = loading
    env_vars = dict((config.get("runtime_env") or {}).get("env_vars") or {})
    engine_kwargs = engine_arguments(
        {name: value for name, value in (config.get("engine_kwargs") or {}).items() if name != "scheduler_cls"},
        "llm_config.engine_kwargs",
    )
    deployment = dict(config.get("deployment_config") or {})
    if loading["model_source"] != named:  # a short name: the small model
        env_vars = {**CPU_ENVIRONMENT, **env_vars}
        engine_kwargs = {**cpu_engine_kwargs(), **engine_kwargs}
    if compat.engine_is_on_cpu():
        env_vars = {**shared_cores(deployment), **env_vars}
        config.setdefault("placement_group_config", {"bundles": [{"CPU": 1}]})
        deployment = {"ray_actor_options": {"num_cpus": 0}, **deployment}
    if Path(loading["model_source"]).is_dir():
        config.setdefault("callback_config", {"callback_class": NothingToDownload})
    config["engine_kwargs"] = {**engine_kwargs, "scheduler_cls": SCHEDULER_CLS}
    config["runtime_env"] = {**(config.get("runtime_env") or {}), "env_vars": {**env_vars, **environment}}
    config["deployment_config"] = {
        "max_ongoing_requests": MOST_ONGOING,
        "graceful_shutdown_timeout_s": DRAIN_S,
        **deployment,
        "request_router_config": {
            "request_router_class": ROUTER_CLASS,
            "request_router_kwargs": {
                "num_classes": num_classes,
                "order": str(settings.order),
                "stale_after_s": settings.stale_after_ms / 1000.0,
            },
        },
    }
    # Ray gathers tokens for 50 ms by default; promises are about each.
    config["experimental_configs"] = {"stream_batching_interval_ms": 0, **(config.get("experimental_configs") or {})}
    config["server_cls"] = SLOServer
    return config


def shared_cores(deployment: Mapping[str, Any]) -> dict[str, str]:
    """Environment of CPU engines on one machine, each of which would bind its threads to the same cores."""
    replicas = deployment.get("num_replicas", 1)
    threads = (os.cpu_count() or 1) // (replicas if isinstance(replicas, int) and replicas > 0 else 1)
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(threads, 1))}


def model_source_of(config: LLMConfig) -> str:
    """Where the model, and so its tokenizer, lies."""
    source = config.model_loading_config.model_source
    return source if isinstance(source, str) else str(config.model_id)
