"""Wires a simulation: workload, profile, policy and router into a cluster, and runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.request import MAX_DRAFT_TOKENS
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.policies.base import Policy
from slos_serve.policies.registry import Parameters, make_policy, policy_entry
from slos_serve.routing.settings import PUBLISH_EVERY_S
from slos_serve.sim.cluster import Apart, Cluster
from slos_serve.sim.drafters import DRAFTERS, NO_DRAFTER
from slos_serve.sim.limits import EngineLimits, ReplicaSettings
from slos_serve.sim.model_error import ModelError
from slos_serve.sim.pair_router import PairRouter
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.rival_routers import RIVAL_ROUTERS
from slos_serve.sim.routers import SLO_ORDERS, Router, make_router
from slos_serve.sim.slo_router import SloRouter, SloRouting
from slos_serve.sim.split import FixedSplit, Links, Placement
from slos_serve.sim.tasks import SimTasks
from slos_serve.workload.calls import Workload

KV_TRANSFER_BYTES_PER_S = 50e9


@dataclass(frozen=True, slots=True)
class SimSettings:
    """Everything of a simulation but the workload, the batch-time model and the engine's limits.

    Attributes:
        policy: name in the registry.
        parameters: of the policy; ``None`` for its default.
        replicas: how many.
        prefill_replicas: of them for prefill, the others for decode; 0 for as the policy has it: one where it keeps
            prefill and decode apart, none elsewhere.
        moving_roles: replicas change between prefill and decode with the mix, under an ``slo`` router.
        router: ``round-robin``, ``least-loaded``, one of ``RIVAL_ROUTERS``, or one of ``SLO_ORDERS``, which ask mirrors
            of the planners.
        sticky_sessions: later rounds of a session go where its prefix is cached, whatever the load there (those that
            ask mirrors decide by themselves).
        publish_every_s, publish_delay_s: age of what an ``slo`` router sees of the replicas, and time to reach it.
        routers, router_tries: ``slo`` routers that share the replicas, and how many others one asks before it gives up.
        reject_classes: classes whose calls an ``slo`` router refuses where no replica attains them.
        oracle_lengths: tell every policy the true output lengths.
        error: injected batch-time error.
        deaths: (virtual seconds, replica) at which replicas die.
        kv_bytes_per_token, transfer_bytes_per_s: for the KV transfer between prefill and decode.
        seed: of injected errors and draft acceptance.
        plan_ahead: steps are planned one ahead, as with vLLM's async scheduling.
        scheduling_s: added to every step.
        drafter: one of ``sim.drafters.DRAFTERS``; with one in the engine ``slos-serve`` plans drafts unless its
            parameters say how long they may be. What it costs is in the batch-time model (``with_drafter``).
    """

    policy: str = "slos-serve"
    parameters: Parameters | None = None
    replicas: int = 1
    prefill_replicas: int = 0
    moving_roles: bool = False
    router: str = "least-loaded"
    sticky_sessions: bool = True
    publish_every_s: float = PUBLISH_EVERY_S
    publish_delay_s: float = 0.0
    routers: int = 1
    router_tries: int = 1
    reject_classes: Sequence[str] = ()
    oracle_lengths: bool = False
    error: ModelError = field(default_factory=ModelError)
    deaths: Sequence[tuple[float, int]] = ()
    kv_bytes_per_token: float = 0.0
    transfer_bytes_per_s: float = KV_TRANSFER_BYTES_PER_S
    seed: int = 0
    plan_ahead: bool = False
    scheduling_s: float = 0.0
    drafter: str = NO_DRAFTER

    @property
    def num_prefill(self) -> int:
        """Replicas for prefill alone; 0 where every replica serves whole calls."""
        own = 1 if policy_entry(self.policy).make_decode is not None else 0
        return self.prefill_replicas or own


def simulate(
    workload: Workload,
    batch_time: BatchTimeModel,
    limits: EngineLimits,
    settings: SimSettings,
    stop: Callable[[Recording, float], bool] | None = None,
    progress: Callable[[float], None] | None = None,
    make_slo_router: Callable[[Recording, SloRouting, SimTasks], SloRouter] = SloRouter,
) -> Recording:
    """Serve a workload in virtual time; returns every token's time.

    ``make_slo_router`` makes the router that asks mirrors, where replicas serve whole calls.

    Raises:
        InvalidFieldError: unknown policy, router or parameter, or a split that leaves a side without replicas.
        PlanFaultError: the policy broke a rule of the engine.
    """
    _check_split(settings)
    recording = Recording.of(workload.bound(batch_time))
    tasks = SimTasks(recording, batch_time, oracle_lengths=settings.oracle_lengths)
    if settings.router in SLO_ORDERS and not settings.num_prefill:
        router: Router | Apart = make_slo_router(recording, _routing(limits, settings), tasks)
    else:
        router = _router(recording, batch_time, limits, settings, tasks)
    replicas = [
        _replica(index, recording, batch_time, limits, settings, router, tasks) for index in range(settings.replicas)
    ]
    return Cluster(recording, replicas, router, settings.deaths, stop=stop, progress=progress).run()


def _router(
    recording: Recording, batch_time: BatchTimeModel, limits: EngineLimits, settings: SimSettings, tasks: SimTasks
) -> Router | Apart:
    if settings.num_prefill:
        links = Links(settings.kv_bytes_per_token / settings.transfer_bytes_per_s)
        return Apart(_placement(recording, limits, settings, tasks, links), links)
    if settings.router in RIVAL_ROUTERS:
        return RIVAL_ROUTERS[settings.router](recording, batch_time)
    return make_router(settings.router, settings.sticky_sessions)


def _placement(
    recording: Recording, limits: EngineLimits, settings: SimSettings, tasks: SimTasks, links: Links
) -> Placement:
    if settings.router in SLO_ORDERS:
        return PairRouter(
            recording,
            _routing(limits, settings),
            tasks,
            links,
            settings.replicas,
            settings.num_prefill,
            moving=settings.moving_roles,
        )
    decode_begins = policy_entry(settings.policy).make_decode is None
    return FixedSplit(recording, settings.num_prefill, links, decode_begins=decode_begins)


def _routing(limits: EngineLimits, settings: SimSettings) -> SloRouting:
    return SloRouting(
        order=SLO_ORDERS[settings.router],
        publish_every_s=settings.publish_every_s,
        publish_delay_s=settings.publish_delay_s,
        reject_classes=settings.reject_classes,
        oracle_lengths=settings.oracle_lengths,
        plan_ahead=settings.plan_ahead,
        prefix_cache=limits.prefix_cache,
        block_size=limits.block_size,
        shards=settings.routers,
        tries=settings.router_tries,
    )


def _replica(
    index: int,
    recording: Recording,
    batch_time: BatchTimeModel,
    limits: EngineLimits,
    settings: SimSettings,
    router: Router | Apart,
    tasks: SimTasks,
) -> Replica:
    decodes = settings.num_prefill > 0 and index >= settings.num_prefill
    policy = _policy(settings, batch_time, len(recording.workload.classes), decodes)
    chooses = router.placement if isinstance(router, Apart) else router
    if isinstance(chooses, SloRouter):
        policy = chooses.watch(index, policy)
    true_lengths = settings.oracle_lengths or policy_entry(settings.policy).true_lengths
    replica_settings = ReplicaSettings(
        true_lengths,
        settings.error,
        settings.seed,
        settings.plan_ahead,
        settings.scheduling_s,
        is_apart=settings.num_prefill > 0,
    )
    return Replica(index, policy, batch_time, limits, recording, replica_settings, tasks)


def _policy(settings: SimSettings, batch_time: BatchTimeModel, num_classes: int, decode: bool) -> Policy:
    parameters = settings.parameters
    if settings.policy == "slos-serve":
        longest = {"max_draft_tokens": MAX_DRAFT_TOKENS} if settings.drafter != NO_DRAFTER else {}
        parameters = {**longest, **(parameters or {})}
    return make_policy(settings.policy, batch_time, num_classes, parameters, decode=decode)


def _check_split(settings: SimSettings) -> None:
    if settings.drafter not in DRAFTERS:
        raise InvalidFieldError("drafter", settings.drafter, f"one of {list(DRAFTERS)}")
    if settings.replicas < 1:
        raise InvalidFieldError("replicas", settings.replicas, "a whole number, 1 or more")
    if settings.num_prefill and not 1 <= settings.num_prefill < settings.replicas:
        raise InvalidFieldError(
            "prefill_replicas", settings.num_prefill, f"1 to {settings.replicas - 1} of {settings.replicas}"
        )
    if settings.num_prefill and settings.router in RIVAL_ROUTERS:
        raise InvalidFieldError("router", settings.router, "least-loaded or an slo router, where prefill is apart")
    if settings.moving_roles and not (settings.num_prefill and settings.router in SLO_ORDERS):
        raise InvalidFieldError("moving_roles", True, "prefill_replicas and an slo router")
    if settings.num_prefill and settings.routers > 1:
        raise InvalidFieldError("routers", settings.routers, "1 where prefill and decode are apart")
    if not 1 <= settings.routers <= settings.replicas:
        raise InvalidFieldError("routers", settings.routers, f"1 to the number of replicas, {settings.replicas}")
    for at_s, replica in settings.deaths:
        if not 0.0 <= at_s < math.inf or not 0 <= replica < settings.replicas:
            raise InvalidFieldError("deaths", (at_s, replica), f"seconds >= 0 and a replica below {settings.replicas}")
