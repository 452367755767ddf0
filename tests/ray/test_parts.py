"""Ray Serve's classes as we extend them, without a cluster: routing, refusals, second attempts, configuration."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")
pytest.importorskip("vllm")

import ray
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest
from starlette.requests import Request

from slos_serve.core.errors import UnsupportedEngineError
from slos_serve.core.verdict import Verdict, Why
from slos_serve.ray_serve import compat, plugin_metrics
from slos_serve.ray_serve.answers import answer_headers, refusal, retry_after
from slos_serve.ray_serve.curve import CurveKeys
from slos_serve.ray_serve.ingress import MAX_ATTEMPTS, SLOIngress, events, is_loss
from slos_serve.ray_serve.live import FleetLive
from slos_serve.ray_serve.plugin_metrics import FleetMetrics, ReplicaMetrics
from slos_serve.ray_serve.prompts import PromptCounter
from slos_serve.ray_serve.router import SLORequestRouter
from slos_serve.ray_serve.ticket import RequestRefusedError, Ticket
from slos_serve.ray_serve.ticket_office import TicketOffice
from slos_serve.ray_serve.wire import ADDRESS_KEY
from slos_serve.routing.router import RoutingDecision, RoutingRequest
from slos_serve.vllm_plugin.config import PluginConfig

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
        assert ticket.decision.reason is Why.NO_STATE


async def test_a_call_without_a_ticket_is_routed_too(router: SLORequestRouter) -> None:
    assert (await router._choose_replica_for_request(pending(None))).name in ("a", "b")


async def test_a_refusal_ends_the_request_at_once(router: SLORequestRouter) -> None:
    ticket = a_ticket(reject=True)
    with pytest.raises(RequestRefusedError) as raised:
        await asyncio.wait_for(router._choose_replica_for_request(pending(ticket)), timeout=30.0)
    assert raised.value.reason == Why.NO_STATE and raised.value.retry_after_s > 0.0
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
    await asyncio.sleep(0.0)
    gc.collect()
    assert not len(router._tickets)


async def test_a_client_that_leaves_while_its_request_waits_for_a_replica_holds_no_room(
    router: SLORequestRouter,
) -> None:
    class Full(Replica):
        async def get_queue_len(self, *, deadline_s: float) -> int:
            return self.max_ongoing_requests

    replicas = [Full("c"), Full("d")]
    router.update_replicas(replicas)
    for replica in replicas:
        router.on_new_queue_len_info(replica.replica_id, replica.max_ongoing_requests)
    waiting = asyncio.create_task(router._choose_replica_for_request(pending(a_ticket())))
    mirrors = router._dispatcher.mirrors
    while not any(map(mirrors.in_flight, mirrors)):
        await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0.1)
    assert [mirrors.in_flight(name) for name in mirrors] == [0, 0]


async def test_a_request_that_ended_leaves_nothing_behind(router: SLORequestRouter) -> None:
    request = pending(a_ticket(session="s"))
    replica = await router._choose_replica_for_request(request)
    router.on_request_completed(replica.replica_id, request.metadata.internal_request_id)
    router.on_request_completed(replica.replica_id, "unknown")
    assert not router._tickets


@pytest.mark.parametrize("old", ["2.59.1", "1.13.0"])
def test_a_ray_that_is_too_old_is_refused_in_one_sentence(old: str) -> None:
    with pytest.raises(
        UnsupportedEngineError, match=r"Ray Serve LLM 2\.60 or later; .*pip install 'ray\[serve\]>=2\.60'"
    ):
        compat.check_version(old)
    for new in (ray.__version__, "2.60.0", "2.100.0", "3.0.0.dev0", "of today"):
        compat.check_version(new)


# The ingress ----------------------------------------------------------------------------------------------------------


class Handle:
    """A deployment handle whose calls answer from a script: exceptions are raised."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.tickets: list[Ticket] = []
        self.chat = self.completions = SimpleNamespace(remote=self._remote)

    def _remote(self, body: object, info: object, ticket: Ticket) -> AsyncIterator[Any]:
        ticket.attempts += 1
        ticket.decision = RoutingDecision(f"replica-{ticket.attempts}", Verdict.ADMITTED, Why.FITS)
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
    return await ingress_of(handle)._first_part(
        SimpleNamespace(model="m", vllm_xargs=None), "completions", request, ticket
    )


@pytest.mark.parametrize(
    ("asked", "load", "told"),
    [
        ("TEXT", {"slos_serve_x": 3.0}, "TEXT named_metrics.slos_serve_x=3.0"),
        ("json", {"slos_serve_x": 3.0}, 'JSON {"named_metrics": {"slos_serve_x": 3.0}}'),
        ("TEXT", {}, None),
        (None, {"slos_serve_x": 3.0}, None),
        ("XML", {"slos_serve_x": 3.0}, None),
    ],
)
async def test_an_answer_carries_the_load_report_that_is_asked_for(
    asked: str | None, load: dict[str, float], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = a_ticket()

    async def made(*_: Any) -> Ticket:
        return ticket

    class Loaded(Handle):
        def _remote(self, body: object, info: object, ticket: Ticket) -> AsyncIterator[Any]:
            if ticket.wants_load:
                ticket.load = load
            return super()._remote(body, info, ticket)

    ingress = ingress_of(Loaded(["data: {}\n\n"]))
    for name, does in (("_ticket", made), ("_count", print), ("_left", print)):
        monkeypatch.setattr(ingress, name, does)
    headers = [] if asked is None else [(b"endpoint-load-metrics-format", asked.encode())]
    request = Request({"type": "http", "headers": headers})
    body = SimpleNamespace(model="m", vllm_xargs=None)
    answer = await ingress._process_llm_request(body, "completions", request)
    assert answer.headers.get("endpoint-load-metrics") == told
    assert answer.status_code == 200 and answer.headers["x-slo-verdict"] == "admitted"


class Fleet:
    """A deployment handle whose replicas answer for the live page, or fail."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers
        self.asked = 0

    def broadcast(self, method: str) -> SimpleNamespace:
        assert method in ("live_state", "plugin_metrics")
        self.asked += 1
        return SimpleNamespace(_fetch_replica_results_async=self._asked)

    async def _asked(self) -> list[Any]:
        if not self.answers:
            raise TimeoutError
        return [SimpleNamespace(get_async=partial(answered, answer)) for answer in self.answers]


SILENT = object()


async def answered(answer: object) -> object:
    """What a replica answers, if it does."""
    if answer is SILENT:
        await asyncio.Event().wait()
    if isinstance(answer, Exception):
        raise answer
    return answer


def showing(fleet: Fleet, live: FleetLive | None) -> SLOIngress:
    ingress = SLOIngress.__new__(SLOIngress)
    ingress._default_serve_handles = {"m": fleet}
    ingress._fleet_metrics = FleetMetrics()
    ingress._live, ingress._looking, ingress._shown, ingress._shown_s = live, asyncio.Lock(), None, 0.0
    return ingress


async def test_the_live_page_asks_all_replicas_but_not_for_every_viewer() -> None:
    fleet = Fleet({"engine": None, "row": {"name": "a"}}, None, {"engine": None, "row": {"name": "b"}})
    ingress = showing(fleet, FleetLive("m", ()))
    first, second = await asyncio.gather(ingress.slo_state(), ingress.slo_state())
    assert first.body == second.body and fleet.asked == 1
    assert [row["name"] for row in json.loads(bytes(first.body))["replicas"]] == ["a", "b"]
    shown = await ingress.slo()
    assert shown.status_code == 200 and shown.media_type is None
    assert (
        shown.headers["content-type"].startswith("text/html")
        and "script-src" in shown.headers["content-security-policy"]
    )


ONE_COUNTER = """# HELP slos_serve:requests_total Requests that ended.
# TYPE slos_serve:requests_total counter
slos_serve:requests_total{model_name="m",slo_class="chat"} %d
# HELP vllm:other_total Not ours.
# TYPE vllm:other_total counter
vllm:other_total 5
"""


async def test_the_plugins_metrics_of_all_replicas_are_on_one_page() -> None:
    fleet = Fleet(("a", ONE_COUNTER % 3), ("b", ONE_COUNTER % 4), ("starts", ""))
    ingress = showing(fleet, None)
    first, second = await asyncio.gather(ingress.plugin_metrics(), ingress.plugin_metrics())
    assert first.status_code == 200 and first.body == second.body and fleet.asked == 1
    assert samples(first) == [
        *(f'slos_serve:replica_silent{{replica="{name}"}} 0.0' for name in ("a", "b", "starts")),
        *(
            f'slos_serve:requests_total{{model_name="m",replica="{name}",slo_class="chat"}} {count}.0'
            for name, count in (("a", 3), ("b", 4))
        ),
    ]
    assert (await showing(Fleet(), None).plugin_metrics()).status_code == 503


def samples(page: Any) -> list[str]:
    return [line for line in bytes(page.body).decode().splitlines() if not line.startswith("#")]


async def test_the_page_of_metrics_has_those_that_answer_and_says_who_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin_metrics, "ASK_EVERY_S", 0.0)
    monkeypatch.setattr(plugin_metrics, "ASK_TIMEOUT_S", 0.05)
    spoke, both = ("a", ONE_COUNTER % 3), [("a", ONE_COUNTER % 3), ("b", ONE_COUNTER % 4)]
    fleet = Fleet(spoke, SILENT)
    ingress = showing(fleet, None)
    silent = [line for line in samples(await ingress.plugin_metrics()) if "silent" in line]
    assert silent == [f'slos_serve:replica_silent{{replica="{name}"}} {n}.0' for name, n in (("a", 0), ("unknown", 1))]
    fleet.answers = tuple(both)
    assert "unknown" not in "".join(samples(await ingress.plugin_metrics()))
    fleet.answers = (spoke, ActorDiedError())
    page = await ingress.plugin_metrics()
    assert page.status_code == 200
    assert 'slos_serve:replica_silent{replica="b"} 1.0' in samples(page)
    assert not [line for line in samples(page) if "requests_total" in line and 'replica="b"' in line]
    fleet.answers = (SILENT, SILENT)
    assert (await ingress.plugin_metrics()).status_code == 503


def test_a_replica_reads_what_its_engine_core_wrote() -> None:
    replica = ReplicaMetrics()
    assert replica.text() == ""
    write = (
        "from slos_serve.vllm_plugin.metrics import SchedulerMetrics; "
        "SchedulerMetrics(['chat']).request_ended('chat', 'aborted')"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": replica.folder}
    subprocess.run([sys.executable, "-c", write], env=environment, check=True)
    assert "slos_serve:requests_total{" in replica.text()


async def test_without_replicas_or_without_a_page_there_is_no_state() -> None:
    silent = showing(Fleet(), FleetLive("m", ()))
    assert (await silent.slo_state()).status_code == 503
    off = showing(Fleet(), None)
    assert (await off.slo_state()).status_code == (await off.slo()).status_code == 404


DEAD_ENGINE = 'data: {"error": {"message": "EngineCore encountered an issue", "code": 500}}\n\n'


@pytest.mark.parametrize("lost", [ActorDiedError(), DEAD_ENGINE])
async def test_what_has_not_begun_is_routed_again(lost: object) -> None:
    handle, ticket = Handle([lost], ["data: {}\n\n"]), a_ticket()
    first, _ = await first_part(handle, ticket)
    assert first == "data: {}\n\n"
    assert ticket.tried == ["replica-1"] and answer_headers(ticket)["x-slo-replica"] == "replica-2"


async def test_a_long_prompt_is_counted_beside_the_event_loop() -> None:
    """While one prompt is tokenized the endpoint goes on: other streams are not held up."""
    counting, go_on = threading.Event(), threading.Event()

    class Slow:
        def encode(self, text: str) -> list[str]:
            counting.set()
            assert go_on.wait(30.0), "the event loop waits for the tokenizer"
            return text.split()

    ingress = SLOIngress.__new__(SLOIngress)
    ingress._office = TicketOffice(PluginConfig(), PromptCounter(Slow()), 100)
    ingress._tokenizers = ThreadPoolExecutor(1)
    waiting = asyncio.create_task(ingress._ticket(SimpleNamespace(prompt="one two", vllm_xargs=None), None))
    while not counting.is_set():
        await asyncio.sleep(0.01)
    assert not waiting.done()
    go_on.set()
    assert (await waiting).asked.prompt_tokens == 2
    ingress._tokenizers.shutdown()


@pytest.mark.parametrize("end", [ValueError("bad"), None])
async def test_a_call_that_fails_or_whose_client_leaves_before_it_begins_is_not_under_way_for_ever(
    end: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that stayed under way would take all time of its task, and keep those of its tenant from ending."""

    class Silent(Handle):
        async def _answer(self, parts: list[Any]) -> AsyncIterator[Any]:
            if end is not None:
                raise end
            await asyncio.Event().wait()
            yield parts

    ingress, left = ingress_of(Silent([])), list[Ticket]()
    monkeypatch.setattr(ingress, "_left", left.append, raising=False)
    body, ticket = SimpleNamespace(model="m", vllm_xargs=None), a_ticket(session="s")
    request = Request({"type": "http", "headers": []})
    asked = asyncio.create_task(ingress._answered(body, "completions", request, ticket))
    for _ in range(5):
        await asyncio.sleep(0.0)
    asked.cancel()
    with pytest.raises((ValueError, asyncio.CancelledError)):
        await asked
    assert left == [ticket]


async def test_a_call_whose_client_leaves_while_its_prompt_is_counted_has_not_come() -> None:
    counting, go_on, done = threading.Event(), threading.Event(), threading.Event()
    made, withdrawn = a_ticket(session="s"), list[Ticket]()

    def slow(*_: object) -> Ticket:
        counting.set()
        assert go_on.wait(30.0)
        return made

    def refused(ticket: Ticket) -> None:
        withdrawn.append(ticket)
        done.set()

    ingress: Any = SLOIngress.__new__(SLOIngress)
    ingress._office = SimpleNamespace(now_s=lambda: 0.0, ticket=slow, tasks=SimpleNamespace(refused=refused))
    ingress._tokenizers = ThreadPoolExecutor(1)
    waiting = asyncio.create_task(ingress._ticket(SimpleNamespace(), "s"))
    while not counting.is_set():
        await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go_on.set()
    assert await asyncio.to_thread(done.wait, 30.0) and withdrawn == [made]
    ingress._tokenizers.shutdown()


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


async def test_the_final_usage_says_what_was_promised_and_measured() -> None:
    """Times are those at the endpoint: the first part comes 0.5 s after the request, each further one 0.1 s later."""
    ticket = a_ticket()
    ticket.decision = RoutingDecision("a", Verdict.ADMITTED, Why.FITS)
    ticket.ttft_s = 0.4
    usage = 'data: {"choices":[],"usage":{"prompt_tokens":100,"completion_tokens":3}}\n\n'
    parts = [["data: {1}\n\n"], ["data: {2}\n\n"], ["data: {3}\n\n"], [usage], ["data: [DONE]\n\n"]]
    moments = iter(ticket.asked.arrival_s + 0.5 + 0.1 * number for number in range(5))
    first, rest = await first_part(Handle(parts), ticket)
    lines = [text async for text in events(first, rest, ticket, lambda: next(moments))]
    assert [lines[0], lines[1], lines[2], lines[4]] == [part[0] for part in (*parts[:3], parts[4])]
    assert json.loads(lines[3].removeprefix("data: "))["usage"]["slo"] == {
        "class": "chat",
        "verdict": "admitted",
        "reason": "fits",
        "rank": 0,
        "ttft_ms": 500.0,
        "tpot_ms": 100.0,
        "target_ttft_ms": 1000.0,
        "target_tpot_ms": 100.0,
        "predicted_ttft_ms": 400.0,
    }


def test_a_refusal_is_429_with_when_and_why() -> None:
    error = pickle.loads(pickle.dumps(RequestRefusedError(str(Why.ALL_FULL), 2.2)))  # it may come from another process
    answer = refusal(error, a_ticket())
    assert answer.status_code == 429 and answer.headers["retry-after"] in ("3", "4", "5")
    error = json.loads(bytes(answer.body))["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", 429, "slo_class")
    assert "'chat' (TTFT 1000 ms, TPOT 100 ms; 100 prompt tokens)" in error["message"]
    assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
    assert (answer.headers["x-slo-verdict"], answer.headers["x-slo-reason"]) == ("rejected", "all_full")
    assert answer.headers["x-slo-target-tpot-ms"] == "100"


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
