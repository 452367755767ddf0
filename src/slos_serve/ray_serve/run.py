"""``python -m slos_serve.ray_serve.run PLAN.json``: replicas behind one endpoint, until a signal comes.

What ``slos-serve serve --replicas`` starts. Joins the Ray cluster that ``RAY_ADDRESS`` names; without one it starts its
own on this machine, which ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

APPLICATION = "slos-serve"
_LOOK_EVERY_S = 1.0
_DRAIN_S = 15.0
# Ray's own metrics agent and log files stay; what it would report to its makers does not. On a machine that engines
# keep busy, Ray's processes take longer to start than the 30 s that it gives them.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}


@dataclass(frozen=True)
class ReplicaPlan:
    """What to serve; plain values, so that it can be handed over as JSON.

    Attributes:
        model: hub name or folder.
        replicas: how many.
        host, port: where the endpoint listens.
        vllm_args: of vLLM's server, for every replica.
        classes, profile, events: the plug-in's files.
        order: whom the router asks first.
    """

    model: str
    replicas: int
    host: str
    port: int
    vllm_args: Sequence[str] = ()
    classes: str | None = None
    profile: str | None = None
    events: str | None = None
    order: str = "prefix"

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ReplicaPlan:
        """The inverse of :meth:`write`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def app_args(plan: ReplicaPlan, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`slos_serve.ray_serve.app.build_app`.

    Args:
        plan: what to serve.
        given: its vLLM arguments by name.
    """
    names = given.get("served_model_name") or [plan.model]
    ours = ("model", "served_model_name", "host", "port", "model_tag", "config")
    args: dict[str, Any] = {
        "llm_config": {
            "model_loading_config": {"model_id": names[0], "model_source": plan.model},
            "engine_kwargs": {name: value for name, value in given.items() if name not in ours},
            "deployment_config": {"num_replicas": plan.replicas},
        },
        "order": plan.order,
        "profile": plan.profile,
    }
    files = {"classes": plan.classes, "events": plan.events}
    return {**args, **{name: path for name, path in files.items() if path is not None}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the plan until SIGINT or SIGTERM; exit status 0 then."""
    plan = ReplicaPlan.read(Path((sys.argv[1:] if arguments is None else arguments)[0]))
    ended = threading.Event()
    _end_on_signals(ended)
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    import ray  # noqa: PLC0415 - reads the environment
    from ray import serve  # noqa: PLC0415

    from slos_serve.profiling.run import given_arguments  # noqa: PLC0415
    from slos_serve.ray_serve.app import build_app  # noqa: PLC0415

    if os.environ.get("RAY_ADDRESS"):
        ray.init()
    else:
        # Logical CPUs only: one a replica is what they ask for, however many cores there are.
        ray.init(num_cpus=max(os.cpu_count() or 1, plan.replicas + 1), include_dashboard=False)
    _end_on_signals(ended)  # once more: Ray has set its own
    try:
        app = build_app(app_args(plan, given_arguments(plan.vllm_args)))
        serve.start(http_options={"host": plan.host, "port": plan.port, "request_timeout_s": None})
        target = serve.RunTarget(app, name=APPLICATION, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        while not ended.wait(_LOOK_EVERY_S):
            found = serve.status().applications[APPLICATION]
            if found.status == "DEPLOY_FAILED":
                sys.stderr.write(f"slos-serve: the replicas cannot start: {found.message}\n")
                return 1
        return 0
    finally:
        drained = threading.Thread(target=serve.shutdown, daemon=True)
        drained.start()
        drained.join(_DRAIN_S)
        ray.shutdown()


def _end_on_signals(ended: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())


if __name__ == "__main__":
    sys.exit(main())
