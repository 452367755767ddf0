"""Wires a simulation: workload, profile, policy and router into a cluster, and runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.request import MAX_DRAFT_TOKENS
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.policies.base import Policy
from slos_serve.policies.registry import Parameters, make_policy, policy_entry
from slos_serve.routing.settings import PUBLISH_EVERY_S
from slos_serve.sim.cluster import Cluster, Handover
from slos_serve.sim.drafters import DRAFTERS, NO_DRAFTER
from slos_serve.sim.limits import EngineLimits, ReplicaSettings
from slos_serve.sim.model_error import ModelError
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.rival_routers import RIVAL_ROUTERS
from slos_serve.sim.routers import SLO_ORDERS, Router, make_router
from slos_serve.sim.slo_router import SloRouter, SloRouting
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
        prefill_replicas: of them, when the policy keeps prefill and decode apart.
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
    prefill_replicas: int = 1
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
    def disaggregated(self) -> bool:
        """Prefill and decode have replicas of their own."""
        return policy_entry(self.policy).make_decode is not None


def simulate(
    workload: Workload,
    batch_time: BatchTimeModel,
    limits: EngineLimits,
    settings: SimSettings,
    stop: Callable[[Recording, float], bool] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Recording:
    """Serve a workload in virtual time; returns every token's time.

    Raises:
        InvalidFieldError: unknown policy, router or parameter, or a split that leaves a side without replicas.
        PlanFaultError: the policy broke a rule of the engine.
    """
    _check_split(settings)
    recording = Recording.of(workload.bound(batch_time))
    tasks = SimTasks(recording, batch_time, oracle_lengths=settings.oracle_lengths)
    router = _router(recording, batch_time, limits, settings, tasks)
    replicas = [
        _replica(index, recording, batch_time, limits, settings, router, tasks) for index in range(settings.replicas)
    ]
    handover = None
    if settings.disaggregated:
        seconds_per_token = settings.kv_bytes_per_token / settings.transfer_bytes_per_s
        handover = Handover(seconds_per_token, make_router("least-loaded", sticky=False))
    cluster = Cluster(recording, replicas, router, handover, settings.deaths, stop=stop, progress=progress)
    return cluster.run()


def _router(
    recording: Recording, batch_time: BatchTimeModel, limits: EngineLimits, settings: SimSettings, tasks: SimTasks
) -> Router:
    if settings.router in RIVAL_ROUTERS:
        return RIVAL_ROUTERS[settings.router](recording, batch_time)
    if settings.router not in SLO_ORDERS:
        return make_router(settings.router, settings.sticky_sessions and not settings.disaggregated)
    routing = SloRouting(
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
    return SloRouter(recording, routing, tasks)


def _replica(
    index: int,
    recording: Recording,
    batch_time: BatchTimeModel,
    limits: EngineLimits,
    settings: SimSettings,
    router: Router,
    tasks: SimTasks,
) -> Replica:
    prefill_only = settings.disaggregated and index < settings.prefill_replicas
    decode = settings.disaggregated and not prefill_only
    policy = _policy(settings, batch_time, len(recording.workload.classes), decode)
    if isinstance(router, SloRouter):
        policy = router.watch(index, policy)
    true_lengths = settings.oracle_lengths or policy_entry(settings.policy).true_lengths
    replica_settings = ReplicaSettings(
        true_lengths, settings.error, settings.seed, settings.plan_ahead, settings.scheduling_s
    )
    return Replica(index, policy, batch_time, limits, recording, replica_settings, prefill_only, tasks)


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
    if settings.disaggregated and not 1 <= settings.prefill_replicas < settings.replicas:
        raise InvalidFieldError(
            "prefill_replicas", settings.prefill_replicas, f"1 to {settings.replicas - 1} of {settings.replicas}"
        )
    if not 1 <= settings.routers <= settings.replicas:
        raise InvalidFieldError("routers", settings.routers, f"1 to the number of replicas, {settings.replicas}")
    for at_s, replica in settings.deaths:
        if at_s < 0.0 or not 0 <= replica < settings.replicas:
            raise InvalidFieldError("deaths", (at_s, replica), f"seconds >= 0 and a replica below {settings.replicas}")
