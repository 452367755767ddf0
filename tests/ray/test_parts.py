"""Ray Serve's classes as we extend them, without a cluster: routing, refusals, second attempts, configuration."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")
pytest.importorskip("vllm")

from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest
from starlette.requests import Request
from starlette.testclient import TestClient

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.launch.endpoint import Endpoint
from slos_serve.launch.serve_config import ServeConfig
from slos_serve.ray_serve import compat
from slos_serve.ray_serve.answers import answer_headers, refusal, retry_after
from slos_serve.ray_serve.app import KEYS, AppConfig, build_app, fastapi_app_with, llm_config_of
from slos_serve.ray_serve.curve import CurveKeys
from slos_serve.ray_serve.ingress import MAX_ATTEMPTS, SLOIngress, events, is_loss
from slos_serve.ray_serve.router import SLORequestRouter
from slos_serve.ray_serve.run import app_args, check_endpoint, http_options
from slos_serve.ray_serve.ticket import RequestRefusedError, Ticket
from slos_serve.ray_serve.wire import ADDRESS_KEY
from slos_serve.routing.router import RoutingDecision, RoutingRequest, Verdict, Why
from slos_serve.vllm_plugin.config import PluginConfig
from tests.builders import OPT_13B_A100

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
KEYS_OF_CLUSTER = CurveKeys.make()
DEPLOYMENT = DeploymentID(name="engine", app_name="app")


# The router class -----------------------------------------------------------------------------------------------------


@dataclass
class Replica:
    """What the router reads of Ray's replica wrapper."""

    name: str
    max_ongoing_requests: int = 10
    replica_metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(unique_id=self.name, deployment_id=DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


def pending(ticket: Ticket | None) -> PendingRequest:
    name = f"r{id(ticket)}"
    kwargs = {} if ticket is None else {"ticket": ticket}
    return PendingRequest(args=[], kwargs=kwargs, metadata=RequestMetadata(request_id=name, internal_request_id=name))


def a_ticket(*, reject: bool = False, session: str | None = None) -> Ticket:
    asked = RoutingRequest(0.0, 100, 10, ttft_due_s=1.0, tpot_s=0.1, reject_when_full=reject)
    return Ticket(asked, slo_class="chat", session=session)


@pytest.fixture
async def router(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SLORequestRouter]:
    monkeypatch.setattr("slos_serve.ray_serve.router.shared_keys", lambda _: KEYS_OF_CLUSTER)
    router = SLORequestRouter(
        deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    router.initialize_state(num_classes=3, order="spread")
    router.update_replicas([Replica("a"), Replica("b", replica_metadata={ADDRESS_KEY: "tcp://127.0.0.1:9"})])
    yield router
    router.close()


async def test_a_request_goes_where_the_dispatcher_says(router: SLORequestRouter) -> None:
    tickets = [a_ticket() for _ in range(4)]
    sent = [(await router._choose_replica_for_request(pending(ticket))).name for ticket in tickets]
    assert sorted(sent) == ["a", "a", "b", "b"]
    for ticket, name in zip(tickets, sent, strict=True):
        assert ticket.decision is not None and ticket.decision.replica == name
        assert ticket.decision.reason is Why.ALL_STALE


async def test_a_call_without_a_ticket_is_routed_too(router: SLORequestRouter) -> None:
    assert (await router._choose_replica_for_request(pending(None))).name in ("a", "b")


async def test_a_refusal_ends_the_request_at_once(router: SLORequestRouter) -> None:
    ticket = a_ticket(reject=True)
    with pytest.raises(RequestRefusedError) as raised:
        await asyncio.wait_for(router._choose_replica_for_request(pending(ticket)), timeout=30.0)
    assert raised.value.reason == Why.ALL_STALE and raised.value.retry_after_s > 0.0
    assert not router._pending_requests_by_id


async def test_a_replica_found_dead_gets_nothing_more(router: SLORequestRouter) -> None:
    router.on_replica_actor_died(Replica("b").replica_id)
    sent = {(await router._choose_replica_for_request(pending(a_ticket()))).name for _ in range(4)}
    assert sent == {"a"}


async def test_the_replica_that_took_the_request_is_named(router: SLORequestRouter) -> None:
    ticket = a_ticket()
    request = pending(ticket)
    chosen = await router._choose_replica_for_request(request)
    other = Replica("b" if chosen.name == "a" else "a")
    router.on_request_routed(request, other.replica_id, None)
    assert ticket.decision is not None and ticket.decision.replica == other.name
    assert ticket.decision.reason is Why.OUT_OF_REACH
    router.on_request_routed(pending(None), other.replica_id, None)


async def test_a_request_that_is_given_up_leaves_nothing_behind(router: SLORequestRouter) -> None:
    await router._choose_replica_for_request(pending(a_ticket(session="s")))
    gc.collect()
    assert not len(router._tickets)


async def test_a_request_that_ended_leaves_nothing_behind(router: SLORequestRouter) -> None:
    request = pending(a_ticket(session="s"))
    replica = await router._choose_replica_for_request(request)
    router.on_request_completed(replica.replica_id, request.metadata.internal_request_id)
    router.on_request_completed(replica.replica_id, "unknown")
    assert not router._tickets


# The ingress ----------------------------------------------------------------------------------------------------------


class Handle:
    """A deployment handle whose calls answer from a script: exceptions are raised."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.tickets: list[Ticket] = []
        self.chat = self.completions = SimpleNamespace(remote=self._remote)

    def _remote(self, body: object, info: object, ticket: Ticket) -> AsyncIterator[Any]:
        ticket.attempts += 1
        ticket.decision = RoutingDecision(f"replica-{ticket.attempts}", Verdict.ATTAIN, Why.ATTAINS)
        self.tickets.append(ticket)
        return self._answer(self.answers.pop(0))

    async def _answer(self, parts: list[Any]) -> AsyncIterator[Any]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part


def ingress_of(handle: Handle) -> SLOIngress:
    ingress = SLOIngress.__new__(SLOIngress)
    ingress._get_model_id = lambda model: asyncio.sleep(0, model)
    ingress._get_configured_serve_handle = lambda _: handle
    return ingress


async def first_part(handle: Handle, ticket: Ticket) -> tuple[Any, Any]:
    request = Request({"type": "http", "headers": []})
    return await ingress_of(handle)._first_part(SimpleNamespace(model="m"), "completions", request, ticket)


DEAD_ENGINE = 'data: {"error": {"message": "EngineCore encountered an issue", "code": 500}}\n\n'


@pytest.mark.parametrize("lost", [ActorDiedError(), DEAD_ENGINE])
async def test_what_has_not_begun_is_routed_again(lost: object) -> None:
    handle, ticket = Handle([lost], ["data: {}\n\n"]), a_ticket()
    first, _ = await first_part(handle, ticket)
    assert first == "data: {}\n\n"
    assert ticket.tried == ["replica-1"] and answer_headers(ticket)["x-slo-replica"] == "replica-2"


async def test_not_for_ever() -> None:
    handle, ticket = Handle(*[[ActorDiedError()]] * MAX_ATTEMPTS), a_ticket()
    with pytest.raises(ActorDiedError):
        await first_part(handle, ticket)
    assert ticket.attempts == MAX_ATTEMPTS


async def test_other_errors_are_not_tried_again() -> None:
    handle = Handle([ValueError("bad")])
    with pytest.raises(ValueError, match="bad"):
        await first_part(handle, a_ticket())


async def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    ticket = a_ticket()
    handle = Handle([["data: {1}\n\n"], ["data: {2}\n\n", "data: {3}\n\n"], ActorDiedError()])
    first, rest = await first_part(handle, ticket)
    lines = [text async for text in events(first, rest, ticket)]
    assert lines[:2] == ["data: {1}\n\n", "data: {2}\n\ndata: {3}\n\n"]
    error = json.loads(lines[2].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("replica_lost", 502)
    assert "after 3 tokens" in error["message"]
    assert lines[3:] == ["data: [DONE]\n\n"]


async def test_an_engine_that_dies_under_a_stream_ends_it_the_same_way() -> None:
    ticket = a_ticket()
    first, rest = await first_part(Handle([["data: {1}\n\n"], [DEAD_ENGINE]]), ticket)
    lines = [text async for text in events(first, rest, ticket)]
    assert '"type": "replica_lost"' in lines[1] and lines[2:] == ["data: [DONE]\n\n"]


async def test_a_whole_stream_is_passed_on_as_it_is() -> None:
    ticket = a_ticket()
    first, rest = await first_part(Handle([["data: {1}\n\n"], ["data: [DONE]\n\n"]]), ticket)
    assert [text async for text in events(first, rest, ticket)] == ["data: {1}\n\n", "data: [DONE]\n\n"]
    assert ticket.output_tokens == 1


def test_a_refusal_is_429_with_when_and_why() -> None:
    error = pickle.loads(pickle.dumps(RequestRefusedError(str(Why.ALL_FULL), 2.2)))  # it may come from another process
    answer = refusal(error, a_ticket())
    assert answer.status_code == 429 and answer.headers["retry-after"] in ("3", "4")
    error = json.loads(bytes(answer.body))["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", 429, "slo_class")
    assert "'chat' (TTFT 1000 ms, TPOT 100 ms; 100 prompt tokens)" in error["message"]
    assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"


def test_clients_come_back_one_by_one() -> None:
    waits = {int(retry_after(20.0)["retry-after"]) for _ in range(200)}
    assert min(waits) >= 20 and max(waits) <= 30 and len(waits) > 5
    assert retry_after(float("inf"), lambda low, _: low) == {"retry-after": "1"}
    assert {int(retry_after(0.0)["retry-after"]) for _ in range(200)} == {1, 2}


def test_a_dead_engine_is_told_from_other_errors() -> None:
    bad = compat.ErrorResponse(error={"message": "too long", "type": "BadRequestError", "code": 400})
    dead = compat.ErrorResponse(error={"message": "EngineDeadError", "type": "InternalServerError", "code": 500})
    assert not is_loss(bad) and is_loss(dead)
    assert is_loss([DEAD_ENGINE]) and not is_loss(['data: {"error": {"message": "no such tool"}}\n\n'])
    assert not is_loss('data: {"choices": [{"text": "EngineCore"}]}\n\n')


# Configuration --------------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    save_profile(Profile("m", "d", "vllm", "1", "now", "float32", 1, 64_000, 16, 2048, OPT_13B_A100), path)
    return path


def arguments(profile: Path, **given: Any) -> dict[str, Any]:
    config = {"model_loading_config": {"model_id": "m", "model_source": str(profile.parent)}}
    return {"llm_config": config, "profile": str(profile), **given}


def test_what_is_given_stays_and_ours_is_filled_in(profile: Path) -> None:
    args = arguments(profile, order="pack", stale_after_ms=500)
    args["llm_config"]["engine_kwargs"] = {"max_model_len": 99, "scheduler_cls": "other"}
    args["llm_config"]["deployment_config"] = {"num_replicas": 3, "health_check_period_s": 4}
    config = llm_config_of(AppConfig.of_args(args), 6, {"A": "b"})
    assert config["engine_kwargs"] == {"max_model_len": 99, "scheduler_cls": "slos_serve.vllm_plugin.SLOScheduler"}
    deployment = config["deployment_config"]
    assert (deployment["num_replicas"], deployment["health_check_period_s"]) == (3, 4)
    assert deployment["request_router_config"]["request_router_kwargs"] == {
        "num_classes": 6,
        "order": "pack",
        "stale_after_s": 0.5,
    }
    assert config["runtime_env"]["env_vars"]["A"] == "b"
    assert args["llm_config"]["engine_kwargs"]["scheduler_cls"] == "other", "what was given is not written to"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"stale": 1}, "args"),
        ({"order": "best"}, "order"),
        ({"publish_every_ms": -1}, "publish_every_ms"),
        ({"ingress_replicas": 0}, "ingress_replicas"),
        ({"llm_config": None}, "llm_config"),
        ({"llm_config": {}}, "model_id"),
        ({"classes": "/nonexistent.yaml"}, "class file"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_starts(
    profile: Path, given: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidFieldError, match=field):
        build_app({**arguments(profile), **given})


def test_a_profile_is_asked_for(profile: Path) -> None:
    args = arguments(profile)
    del args["profile"]
    with pytest.raises(InvalidFieldError, match="slos-serve profile"):
        build_app(args)


def test_the_plan_of_the_command_line(tmp_path: Path) -> None:
    plan = ServeConfig(
        model="/models/m",
        replicas=2,
        vllm_args=("--max-num-seqs", "8"),
        plugin=PluginConfig(profile_path=Path("/p.json"), ttft_margin_ms=5.0),
    )
    plan.write(tmp_path / "plan.json")
    assert ServeConfig.read(tmp_path / "plan.json") == plan
    args = app_args(plan, {"max_num_seqs": 8, "served_model_name": ["short"], "port": 8000})
    assert args == {
        "llm_config": {
            "model_loading_config": {"model_id": "short", "model_source": "/models/m"},
            "engine_kwargs": {"max_num_seqs": 8},
            "deployment_config": {"num_replicas": 2},
        },
        "order": "prefix",
        "profile": "/p.json",
        "ttft_margin_ms": 5.0,
    }


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"api_key": ["sk-1"]}, "set VLLM_API_KEY in the environment"),
        ({"ssl_keyfile": "k"}, "http_options"),
        ({"root_path": "/x"}, "proxy in front"),
        ({"enable_request_id_headers": True}, "HTTP side"),
    ],
)
def test_front_end_arguments_of_a_yaml_are_refused(profile: Path, kwargs: dict[str, Any], said: str) -> None:
    args = arguments(profile)
    args["llm_config"]["engine_kwargs"] = kwargs
    with pytest.raises(InvalidFieldError, match=said) as caught:
        build_app(args)
    assert "llm_config.engine_kwargs" in str(caught.value) and "sk-1" not in str(caught.value)


def test_replicas_refuse_front_end_arguments_of_the_command_line() -> None:
    config = ServeConfig(model="/models/m", replicas=2)
    given = {"api_key": ["sk-1"], "ssl_keyfile": "k", "host": "h", "config": "c", "max_num_seqs": 8}
    assert app_args(config, given)["llm_config"]["engine_kwargs"] == {"max_num_seqs": 8}
    with pytest.raises(InvalidFieldError, match="--root-path"):
        app_args(config, {**given, "root_path": "/x"})


def test_the_endpoints_options() -> None:
    assert http_options(Endpoint()) == {"host": "0.0.0.0", "port": 8000, "request_timeout_s": None}
    tls = Endpoint(host="10.0.0.5", port=443, ssl_certfile="c", ssl_keyfile="k", ssl_ca_certs="a")
    assert http_options(tls) == {
        "host": "10.0.0.5",
        "port": 443,
        "request_timeout_s": None,
        "ssl_certfile": "c",
        "ssl_keyfile": "k",
        "ssl_ca_certs": "a",
    }
    with pytest.raises(InvalidFieldError, match="together with --ssl-certfile"):
        http_options(Endpoint(ssl_certfile="c"))


def test_a_cluster_whose_endpoint_is_another_is_refused() -> None:
    wanted = http_options(Endpoint(ssl_certfile="c", ssl_keyfile="k"))
    check_endpoint(wanted, SimpleNamespace(port=8000, ssl_certfile="c", ssl_keyfile="k"))
    with pytest.raises(InvalidFieldError, match="--ssl-certfile"):
        check_endpoint(wanted, SimpleNamespace(port=8000, ssl_certfile=None, ssl_keyfile=None))
    with pytest.raises(InvalidFieldError, match="--port"):
        check_endpoint(wanted, SimpleNamespace(port=9000, ssl_certfile="c", ssl_keyfile="k"))


def test_the_application_asks_for_a_key_before_it_reads_a_body() -> None:
    body = b'{"vllm_xargs": {"slo_class": "no such class"}}'
    for keys, wanted in ((("sk-1",), 401), ((), 400)):
        client = TestClient(fastapi_app_with(keys, AppConfig(llm_config={}, max_request_mib=0.001)))
        headers = {"content-type": "application/json"}
        assert client.post("/v1/completions", content=body, headers=headers).status_code == wanted
        headers["authorization"] = "Bearer sk-1"
        assert client.post("/v1/completions", content=body, headers=headers).status_code == 400
        assert client.post("/v1/completions", content=b" " * 2000, headers=headers).status_code == 413


def test_the_example_and_the_page_agree_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = yaml.safe_load((ROOT / "examples" / "serve.yaml").read_text(encoding="utf-8"))["applications"][0]
    settings = AppConfig.of_args(given["args"])
    assert given["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
    assert settings.plugin.classes_path is not None and settings.plugin.classes_path.is_file()
    page = (ROOT / "docs" / "ray-serve.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE))
    assert listed | {"llm_config"} == set(KEYS)
