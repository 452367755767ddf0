"""How many replicas a workload needs: doubling until enough, then bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from slos_serve.files.profile_file import Profile
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import kv_bytes_per_token, limits_of
from slos_serve.workload.calls import Workload


def fewest_replicas(
    workload: Workload,
    profile: Profile,
    settings: SimSettings,
    target: float,
    most: int,
    tried: Callable[[int, float], None],
) -> dict[str, Any]:
    """Fewest replicas with the target attainment.

    Args:
        workload: what arrives.
        profile: of every replica.
        settings: everything but the number of replicas.
        target: share of requests that must attain.
        most: give up above this many.
        tried: told (replicas, attainment) of every simulation.

    Returns:
        ``replicas`` (0 when ``most`` do not suffice), ``attainment`` there, ``attainment_with_one_fewer``, ``tried``.
    """
    known: dict[int, float] = {}

    def enough(count: int) -> bool:
        if count not in known:
            known[count] = _attainment(workload, profile, settings, count)
            tried(count, known[count])
        return known[count] >= target

    least = 2 if settings.num_prefill else 1
    low, high = least - 1, least
    while not enough(high):
        if high >= most:
            return _result(0, known, high)
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return _result(high, known, high)


def _attainment(workload: Workload, profile: Profile, settings: SimSettings, replicas: int) -> float:
    fleet = replace(
        settings,
        replicas=replicas,
        prefill_replicas=max(replicas // 2, 1) if settings.num_prefill else 0,
        kv_bytes_per_token=kv_bytes_per_token(profile),
    )
    return summarize_run(simulate(workload, profile.model, limits_of(profile), fleet)).attainment


def _result(replicas: int, known: dict[int, float], last: int) -> dict[str, Any]:
    return {
        "replicas": replicas,
        "attainment": known[last],
        "attainment_with_one_fewer": known.get(replicas - 1),
        "tried": sorted(known.items()),
    }
