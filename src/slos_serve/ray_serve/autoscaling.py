"""How many replicas are needed for promises to be kept: a policy for Ray Serve's autoscaler.

Ray pickles this module by value and calls the policy in its controller. Each replica reports its fullness: the
share of its time or KV that promises take (:mod:`slos_serve.routing.headroom`). The policy holds the replicas' mean
at a target below 1, so that there is room for what comes while a new replica starts.
"""

from __future__ import annotations

from typing import Any

from slos_serve.routing.demand import TARGET_FULLNESS

_FULLNESS = "slos_serve_fullness"


def headroom_policy(context: Any) -> tuple[float, dict[str, Any]]:
    """Replicas wanted, as a policy function of ``autoscaling_config``; Ray applies its own bounds and delays.

    Args:
        context: :class:`ray.serve.config.AutoscalingContext`.

    Returns:
        Wanted number of replicas, and no state. As many as now until replicas have reported; at least one while a
        request is there, so that an application that was scaled to zero wakes.
    """
    least = 1.0 if context.total_num_requests > 0 else 0.0
    reported = (context.aggregated_metrics or {}).get(_FULLNESS) or {}
    fullness = [float(value) for value in reported.values() if value is not None]
    if not fullness:
        return max(float(context.current_num_replicas), least), {}
    mean = sum(fullness) / len(fullness)
    return max(context.current_num_replicas * mean / TARGET_FULLNESS, least), {}
