"""The Serve application: one OpenAI endpoint in front of replicas that plan.

``import_path: slos_serve.ray_serve.app:build_app`` in a Serve YAML, or :func:`build_app` from Python. The engine
deployment is Ray Serve LLM's with our server class; the endpoint is Ray Serve LLM's with the middleware around it
(docs/decisions.md says why ``build_openai_app`` does not do).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import make_fastapi_ingress

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet, check_number
from slos_serve.files.class_file import load_classes
from slos_serve.files.profile_file import load_profile
from slos_serve.launch.cpu_model import resolve_model
from slos_serve.launch.server import CPU_ENVIRONMENT, SCHEDULER_CLS, Plugin, cpu_engine_kwargs
from slos_serve.ray_serve import compat
from slos_serve.ray_serve.engine import NothingToDownload
from slos_serve.ray_serve.ingress import SLOIngress
from slos_serve.ray_serve.json_only import JsonOnly
from slos_serve.ray_serve.server import HANG_VARIABLE, SLOServer
from slos_serve.routing.settings import PUBLISH_EVERY_S, STALE_AFTER_S, Order
from slos_serve.vllm_plugin.middleware import SLOMiddleware
from slos_serve.vllm_plugin.settings import PUBLISH_EVERY_VARIABLE

ROUTER_CLASS = "slos_serve.ray_serve.router:SLORequestRouter"
ENDPOINTS = {**compat.DEFAULT_ENDPOINTS, "health": lambda app: app.get("/health")}
# Streams that run when a replica is to go (scaling down, a new version) may end first.
DRAIN_S = 600.0
MOST_ONGOING = 100_000
KEYS = (
    "llm_config",
    "classes",
    "profile",
    "events",
    "order",
    "publish_every_ms",
    "stale_after_ms",
    "hang_after_s",
    "ingress_replicas",
)


@dataclass(frozen=True)
class AppSettings:
    """What the application adds to Ray's own settings.

    Attributes:
        llm_config: as of ``ray.serve.llm.LLMConfig``.
        plugin: class file, profile, events.
        order: whom the router asks first.
        publish_every_ms: age that a replica's publication may reach.
        stale_after_ms: a replica that has not published for this long counts as full.
        hang_after_s: a replica whose requests wait this long for a step is replaced.
        ingress_replicas: endpoints; each routes by its own picture of the replicas.
    """

    llm_config: Mapping[str, Any]
    plugin: Plugin
    order: Order = Order.PREFIX
    publish_every_ms: float = PUBLISH_EVERY_S * 1000.0
    stale_after_ms: float = STALE_AFTER_S * 1000.0
    hang_after_s: float = 60.0
    ingress_replicas: int = 1

    @classmethod
    def of_args(cls, args: Mapping[str, Any]) -> AppSettings:
        """Read the ``args`` of a Serve YAML.

        Raises:
            InvalidFieldError: a key is unknown or missing, or its value cannot be used.
        """
        unknown = sorted(set(args) - set(KEYS))
        if unknown:
            raise InvalidFieldError("args", unknown[0], f"one of {list(KEYS)}")
        if not isinstance(args.get("llm_config"), Mapping):
            raise InvalidFieldError("llm_config", args.get("llm_config"), "a mapping, as of ray.serve.llm.LLMConfig")
        if "profile" not in args:
            raise InvalidFieldError(
                "profile", None, "a batch-time profile's path; `slos-serve profile MODEL` makes one"
            )
        numbers = {
            name: check_number(name, args[name], low=0.0, high=86_400_000.0)
            for name in ("publish_every_ms", "stale_after_ms", "hang_after_s")
            if name in args
        }
        if args.get("order", "prefix") not in list(Order):
            raise InvalidFieldError("order", args["order"], f"one of {[order.value for order in Order]}")
        return cls(
            llm_config=args["llm_config"],
            plugin=Plugin(*(Path(args[key]) if args.get(key) else None for key in ("classes", "profile", "events"))),
            order=Order(args.get("order", Order.PREFIX)),
            ingress_replicas=int(check_number("ingress_replicas", args.get("ingress_replicas", 1), low=0.0, high=1e4)),
            **numbers,
        )


def build_app(args: dict[str, Any]) -> Application:
    """The application of a Serve YAML's ``args``; see :class:`AppSettings` and docs/ray-serve.md.

    Raises:
        InvalidFieldError: an argument, the class file or the profile cannot be used.
    """
    settings = AppSettings.of_args(args)
    classes = ClassSet() if settings.plugin.classes is None else load_classes(settings.plugin.classes)
    if settings.plugin.profile is not None:
        load_profile(settings.plugin.profile)  # an unusable one is refused here and not by each replica
    environment = {
        **settings.plugin.environment,
        PUBLISH_EVERY_VARIABLE: f"{settings.publish_every_ms:g}",
        HANG_VARIABLE: f"{settings.hang_after_s:g}",
    }
    config = LLMConfig(**llm_config_of(settings, len(classes) + 2, environment))
    engine = build_llm_deployment(config)
    app = compat.fastapi_app()
    app.add_middleware(SLOMiddleware)
    app.add_middleware(JsonOnly)
    ingress = serve.deployment(
        make_fastapi_ingress(SLOIngress, endpoint_map=ENDPOINTS, app=app),
        name="SLOIngress",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=MOST_ONGOING,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": dict(config.runtime_env["env_vars"])}},
    )
    return ingress.bind(
        llm_deployments={config.model_id: engine},
        model_cards={config.model_id: compat.to_model_metadata(config.model_id, config)},
        tokenizer=str(config.model_loading_config.tokenizer_source or model_source_of(config)),
        max_model_len=config.engine_kwargs.get("max_model_len"),
        trust_remote_code=bool(config.engine_kwargs.get("trust_remote_code", False)),
    )


def llm_config_of(settings: AppSettings, num_classes: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """Ray's configuration with ours filled in; what is given there stays, but for scheduler, server and router."""
    config: dict[str, Any] = copy.deepcopy(dict(settings.llm_config))
    loading = dict(config.get("model_loading_config") or {})
    if "model_id" not in loading:
        raise InvalidFieldError("llm_config.model_loading_config.model_id", None, "the name that clients use")
    named = str(loading.get("model_source") or loading["model_id"])
    loading["model_source"] = resolve_model(named)
    config["model_loading_config"] = loading
    env_vars = dict((config.get("runtime_env") or {}).get("env_vars") or {})
    engine_kwargs = dict(config.get("engine_kwargs") or {})
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
