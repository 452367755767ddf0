"""``python -m slos_serve.ray_serve.run CONFIG.json``: replicas behind one endpoint, until a signal comes.

``slos-serve serve --replicas`` starts this. It joins the Ray cluster that ``RAY_ADDRESS`` names; without one it starts
its own on this machine, which ends with it. API keys come in the environment and never reach Ray.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.core.redaction import redacted_text
from slos_serve.launch.endpoint import Endpoint
from slos_serve.launch.serve_config import ServeConfig
from slos_serve.ray_serve.api_keys import take_keys
from slos_serve.ray_serve.arguments import ENDPOINT_ARGUMENTS, engine_arguments
from slos_serve.vllm_plugin.config import PLUGIN_KEYS

APPLICATION = "slos-serve"
_LOOK_EVERY_S = 1.0
# As long as Kubernetes waits by default, less what the end itself takes.
_DRAIN_S = 25.0
_END_S = 15.0
# Ray's own metrics agent and log files stay; what it would report to its makers does not. On a machine that engines
# keep busy, Ray's processes take longer to start than the 30 s that it gives them.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}


def app_args(config: ServeConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`slos_serve.ray_serve.app.build_app`.

    Args:
        config: what to serve.
        given: its vLLM arguments by name.

    Raises:
        InvalidFieldError: an argument that replicas do not take.
    """
    names = given.get("served_model_name") or [config.model]
    engine = {name: value for name, value in given.items() if name not in ENDPOINT_ARGUMENTS}
    plugin = config.plugin.model_dump(mode="json", exclude_unset=True)
    files = {name: str(Path(plugin[name]).resolve()) for name in plugin if name.endswith("_path") and plugin[name]}
    told = {**plugin, **files}
    return {
        "llm_config": {
            "model_loading_config": {"model_id": names[0], "model_source": config.model},
            "engine_kwargs": engine_arguments(engine),
            "deployment_config": {"num_replicas": config.replicas},
        },
        "order": config.order.value,
        **{PLUGIN_KEYS[name]: value for name, value in told.items() if name in PLUGIN_KEYS and value is not None},
    }


def http_options(endpoint: Endpoint) -> dict[str, Any]:
    """Ray Serve's HTTP options."""
    files = {name: getattr(endpoint, name) for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")}
    if not endpoint.is_tls and any(files.values()):
        raise InvalidFieldError("--ssl-keyfile", endpoint.ssl_keyfile, "given together with --ssl-certfile")
    return {
        "host": endpoint.host or "0.0.0.0",
        "port": endpoint.port,
        "request_timeout_s": None,
        **{name: path for name, path in files.items() if path is not None},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the configuration until SIGINT or SIGTERM; exit status 0 then."""
    config = ServeConfig.read(Path((sys.argv[1:] if arguments is None else arguments)[0]))
    ended = threading.Event()
    _end_on_signals(ended)
    keys = take_keys(os.environ)  # before Ray starts processes that inherit the environment
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    import ray  # noqa: PLC0415 - reads the environment

    from slos_serve.profiling.run import given_arguments  # noqa: PLC0415

    try:
        args = app_args(config, given_arguments(config.vllm_args))
        options = http_options(config.endpoint)
        if os.environ.get("RAY_ADDRESS"):
            ray.init()
        else:
            # Logical CPUs only: one a replica is what they ask for, however many cores there are.
            num_cpus = max(os.cpu_count() or 1, (config.replicas or 1) + 1)
            ray.init(num_cpus=num_cpus, include_dashboard=False)
        _end_on_signals(ended)  # once more: Ray has set its own
        return _serve(args, options, keys, ended)
    except SlosServeError as error:
        sys.stderr.write(f"slos-serve: {redacted_text(str(error), keys)}\n")
        return 2
    finally:
        ray.shutdown()


def _serve(args: dict[str, Any], options: dict[str, Any], keys: Sequence[str], ended: threading.Event) -> int:
    """Run the application until ``ended`` is set or it cannot start."""
    from ray import serve  # noqa: PLC0415

    from slos_serve.ray_serve.app import build_app  # noqa: PLC0415
    from slos_serve.ray_serve.compat import endpoint_options  # noqa: PLC0415

    app = build_app(args, keys)
    try:
        serve.start(http_options=options)
        check_endpoint(options, endpoint_options())
        target = serve.RunTarget(app, name=APPLICATION, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        while not ended.wait(_LOOK_EVERY_S):
            found = serve.status().applications[APPLICATION]
            if found.status == "DEPLOY_FAILED":
                sys.stderr.write(f"slos-serve: the replicas cannot start: {redacted_text(found.message, keys)}\n")
                return 1
        return 0
    finally:
        # The endpoint stays while requests in progress end; new ones are answered 404 by Ray's proxy meanwhile.
        _within(_DRAIN_S, lambda: serve.delete(APPLICATION))
        _within(_END_S, serve.shutdown)


def _within(limit_s: float, work: Callable[[], object]) -> None:
    """Do it, and wait no longer than that."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)


def check_endpoint(wanted: Mapping[str, Any], running: Any) -> None:
    """A cluster that serves already keeps its own endpoint: its TLS and port must be those asked for.

    Raises:
        InvalidFieldError: names the option.
    """
    for name in ("port", "ssl_certfile", "ssl_keyfile"):
        there = getattr(running, name, None)
        if wanted.get(name) != there:
            allowed = f"{there!r}, as the Ray Serve endpoint that runs on this cluster has it"
            raise InvalidFieldError(f"--{name.replace('_', '-')}", wanted.get(name), allowed)


def _end_on_signals(ended: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())


if __name__ == "__main__":
    sys.exit(main())
