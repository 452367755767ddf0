"""Policies by name: how to make one, and the parameters worth trying when each is to be at its best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.settings import PlannerSettings
from slos_serve.policies.base import Policy
from slos_serve.policies.distserve import DistServeDecode, DistServePrefill
from slos_serve.policies.edf import EarliestDeadlineFirst
from slos_serve.policies.jitserve import JitServe
from slos_serve.policies.qoserve import QoServe
from slos_serve.policies.sarathi import Sarathi
from slos_serve.policies.scorpio import Scorpio
from slos_serve.policies.slos_serve import SLOsServePolicy
from slos_serve.policies.vllm_order import VllmOrder
from slos_serve.policies.vllm_v0 import VllmV0

Parameters = Mapping[str, Any]
Factory = Callable[[BatchTimeModel, int, Parameters], Policy]


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """A policy that can be named.

    Attributes:
        make: (batch-time model, number of classes, parameters) -> policy of one replica.
        variants: parameter sets that a fair comparison tries; the first one is the default.
        make_decode: set when prefill and decode are apart; then ``make`` is for prefill replicas.
        fixed_drafts: takes ``draft_tokens``, one draft length for every decode; to be tuned where there is a drafter.
        true_lengths: the engine tells it the true output lengths, which no real engine could.
    """

    make: Factory
    variants: tuple[Parameters, ...] = field(default=({},))
    make_decode: Factory | None = None
    fixed_drafts: bool = True
    true_lengths: bool = False


def _plain(policy: Callable[..., Policy]) -> Factory:
    """A policy that needs neither the model nor the classes."""
    return lambda _model, _classes, given: policy(**given)


def _slos_serve(model: BatchTimeModel, num_classes: int, given: Parameters) -> Policy:
    return SLOsServePolicy(model, num_classes, PlannerSettings(**given))


def _jitserve(_model: BatchTimeModel, num_classes: int, given: Parameters) -> Policy:
    return JitServe(num_classes, **given)


# The first variants of QoServe and JITServe are what benchmarks/tune.py found; the papers' defaults stand behind them.
_JITSERVE_VARIANTS = (
    *({"token_budget": size, "frame_steps": 10, "lateness_power": 8.0, "drop_after_s": 0.0} for size in (2048, 512)),
    {},
)

POLICIES: dict[str, PolicyEntry] = {
    "slos-serve": PolicyEntry(_slos_serve, fixed_drafts=False),
    "vllm": PolicyEntry(_plain(VllmOrder), tuple({"token_budget": size} for size in (2048, 4096, 8192))),
    "vllm-v0": PolicyEntry(_plain(VllmV0), ({"token_budget": 8192},)),
    "sarathi": PolicyEntry(_plain(Sarathi), tuple({"chunk_tokens": size} for size in (512, 256, 1024, 2048))),
    "distserve": PolicyEntry(
        lambda model, _classes, _given: DistServePrefill(model), make_decode=_plain(DistServeDecode)
    ),
    "scorpio": PolicyEntry(
        lambda model, num_classes, given: Scorpio(model, num_classes, **given),
        tuple({"chunk_tokens": size} for size in (0, 512, 1024)),
    ),
    "edf": PolicyEntry(
        _plain(EarliestDeadlineFirst),
        tuple({"token_budget": size, "drop_late": True} for size in (512, 256, 1024, 2048)),
    ),
    "qoserve": PolicyEntry(
        lambda model, num_classes, given: QoServe(model, num_classes, **given),
        ({"alpha_ms": 2.0, "time_margin": 0.1, "max_tokens": 1024}, {"alpha_ms": 8.0}, {"alpha_ms": 0.0}),
    ),
    "jitserve": PolicyEntry(_jitserve, _JITSERVE_VARIANTS),
    "jitserve-oracle": PolicyEntry(_jitserve, _JITSERVE_VARIANTS, true_lengths=True),
}


def policy_entry(name: str) -> PolicyEntry:
    """The entry of a name.

    Raises:
        InvalidFieldError: no such policy, with the list of those there are.
    """
    if name not in POLICIES:
        raise InvalidFieldError("policy", name, f"one of {sorted(POLICIES)}")
    return POLICIES[name]


def make_policy(
    name: str, model: BatchTimeModel, num_classes: int, parameters: Parameters | None = None, *, decode: bool = False
) -> Policy:
    """A fresh policy for one replica; ``None`` parameters are the default ones.

    Raises:
        InvalidFieldError: unknown policy or parameter, or a value out of range.
    """
    entry = policy_entry(name)
    given = entry.variants[0] if parameters is None else parameters
    factory = entry.make_decode if decode and entry.make_decode is not None else entry.make
    try:
        return factory(model, num_classes, given)
    except TypeError as fault:
        raise InvalidFieldError(f"parameters of {name}", dict(given), str(fault)) from fault
