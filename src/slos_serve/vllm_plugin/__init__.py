"""The plug-in for vLLM: a scheduler class and an ASGI middleware, named on vLLM's command line.

Names are imported on first use, so that importing this package (or the middleware) does not import vLLM.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "SLOMiddleware": "slos_serve.vllm_plugin.middleware",
    "SLOScheduler": "slos_serve.vllm_plugin.scheduler",
}

__all__ = ["SLOMiddleware", "SLOScheduler"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
