"""Two real replicas behind one endpoint: clients, verdicts, sessions, refusals; then one is killed under load.

One start serves all tests; then every replica is replaced by an update, and the test that kills comes last.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray")
vllm = pytest.importorskip("vllm")

from openai import AsyncOpenAI, BadRequestError, OpenAI, RateLimitError
from prometheus_client.parser import text_string_to_metric_families

from slos_serve.launch.cpu_engine import cpu_engine_args
from slos_serve.launch.endpoint import Endpoint, free_port
from slos_serve.launch.serve_config import ServeConfig
from slos_serve.launch.server import ServerProcess
from slos_serve.routing.settings import Order
from slos_serve.vllm_plugin.config import PluginConfig
from tests.cpu_profile import save_rough_profile
from tests.ray.processes import titled

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.long]

MODEL = "small"
NUM_REQUESTS = 40
REPLACED_WITHIN_S = 240
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
ENGINES = "ServeReplica:slos-serve:SLOServer"
# Wide enough for two engines on two cores that something else may use too; `now` can never be kept.
CLASSES = """
default_class: chat
classes:
  chat: {ttft_ms: 60000, tpot_ms: 5000}
  code: {ttft_ms: 30000, tpot_ms: 3000, weight: 2}
  now: {ttft_ms: 1, tpot_ms: 1, when_full: reject}
  hopeless: {ttft_ms: 1, tpot_ms: 1}
  tool: {ttft_ms: 30000, tpot_ms: 3000, last_round: chat}
  patient: {ttft_ms: 1, tpot_ms: 1, otherwise: [{ttft_ms: 2}, {ttft_ms: 60000, tpot_ms: 5000}]}
  crowd: {ttft_ms: 4000, tpot_ms: 5000, when_full: reject}
  batch: {}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, cpu_model: str) -> ServeConfig:
    folder = tmp_path_factory.mktemp("replicas")
    save_rough_profile(cpu_model, folder)
    (folder / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    return ServeConfig(
        model=cpu_model,
        replicas=2,
        endpoint=Endpoint(host="127.0.0.1", port=free_port()),
        vllm_args=(*cpu_engine_args(), "--served-model-name", MODEL),
        plugin=PluginConfig(classes_path=folder / "classes.yaml", profile_path=folder / "profile.json"),
        order=Order.SPREAD,
    )


@pytest.fixture(scope="module")
def server(plan: ServeConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    log_path = folder / "server.log"
    command = command_of(plan, folder / "plan.json")
    with ServerProcess(
        plan.model, endpoint=plan.endpoint, environment=ENVIRONMENT, command=command, output=log_path
    ) as running:
        wait_for_replicas(running, 2)
        yield running


def command_of(plan: ServeConfig, path: Path) -> list[str]:
    """What serves the plan, written to ``path``."""
    plan.write(path)
    return ServerProcess.python_command("slos_serve.ray_serve.run", str(path))


def wait_for_replicas(server: ServerProcess, count: int) -> None:
    """Ask until so many replicas have answered; several at a time, since an idle one is asked first."""
    until_s = time.monotonic() + 2 * REPLACED_WITHIN_S
    with ThreadPoolExecutor(2 * count) as pool:
        while time.monotonic() < until_s:
            answers = list(pool.map(lambda _: complete(server, max_tokens=8), range(2 * count)))
            seen = {answer.headers["x-slo-replica"] for answer in answers if answer.is_success}
            if len(seen) == count:
                return
            time.sleep(1.0)
    raise AssertionError(f"{len(seen)} replicas answered")


def complete(server: ServerProcess, slo_class: str = "chat", **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2, "temperature": 0.0, **fields}
    return httpx.post(f"{server.base_url}/v1/completions", json=body, headers={"x-slo-class": slo_class}, timeout=300.0)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=300.0) as found:
        yield found


async def one_of_many(client: AsyncOpenAI, index: int) -> tuple[str, str, str, str]:
    """A request of one of four kinds; its class, verdict, replica and answer."""
    slo_class = ("chat", "code", "batch", "none")[index % 4]
    headers = {"x-slo-class": slo_class}
    prompt = "Count. " + " ".join(str(number) for number in range(index))
    if index % 3 == 0:
        chat = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": prompt}], max_tokens=8, extra_headers=headers
        )
        text, found = chat.parse().choices[0].message.content or "", chat.headers
    else:
        stream = await client.completions.with_raw_response.create(
            model=MODEL, prompt=prompt, max_tokens=8, stream=True, extra_headers=headers
        )
        parts = [chunk.choices[0].text async for chunk in stream.parse() if chunk.choices]
        text, found = "".join(parts), stream.headers
    return found["x-slo-class"], found["x-slo-verdict"], found["x-slo-replica"], text


async def test_forty_mixed_requests_are_served_by_both(server: ServerProcess) -> None:
    gate = asyncio.Semaphore(8)
    async with AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=300.0) as client:

        async def one(index: int) -> tuple[str, str, str, str]:
            async with gate:
                return await one_of_many(client, index)

        answers = await asyncio.gather(*(one(index) for index in range(NUM_REQUESTS)))
    assert all(text for *_, text in answers)
    assert len({replica for _, _, replica, _ in answers}) == 2
    verdicts = Counter((slo_class, verdict) for slo_class, verdict, _, _ in answers)
    assert verdicts == {
        ("chat", "admitted"): 10,
        ("code", "admitted"): 10,
        ("batch", "no-slo"): 10,
        ("none", "no-slo"): 10,
    }


async def test_promises_that_were_told_bind_the_replicas(server: ServerProcess) -> None:
    """Long prompts come first; the short ones behind them are worth more, and would take their place."""
    limits = httpx.Limits(max_connections=60)
    async with httpx.AsyncClient(base_url=server.base_url, timeout=300.0, limits=limits) as client:

        async def one(number: int) -> httpx.Response:
            prompt = f"{number} " + "word " * (700 if number < 8 else 60)
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0.0}
            return await client.post("/v1/completions", json=body, headers={"x-slo-class": "crowd"})

        answers = await asyncio.gather(*(one(number) for number in range(60)))
    served = [answer for answer in answers if answer.is_success]
    assert {answer.status_code for answer in answers} == {200, 429} and len(served) >= 8
    assert {answer.headers["x-slo-verdict"] for answer in served} == {"admitted"}
    found: Counter[str] = Counter()
    for _ in range(100):  # metrics leave the scheduler by a thread of their own
        found = engine_verdicts(server, "crowd")
        if found.total() >= len(served):
            break
        await asyncio.sleep(0.2)
    assert found == {"admitted": len(served)}, "each replica does what the ingress told"


def engine_verdicts(server: ServerProcess, slo_class: str) -> Counter[str]:
    """What the engines of all replicas made of a class's requests."""
    text = httpx.get(f"{server.base_url}/metrics", timeout=30.0).text
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "slos_serve:requests_total" and sample.labels["slo_class"] == slo_class:
                found[sample.labels["verdict"]] += int(sample.value)
    return +found


def test_the_live_page_shows_both_replicas(server: ServerProcess) -> None:
    shown = httpx.get(f"{server.base_url}/slo", timeout=30.0)
    assert shown.status_code == 200 and "default-src 'none'" in shown.headers["content-security-policy"]
    complete(server, "chat")
    until_s = time.monotonic() + 30.0
    while True:
        state = httpx.get(f"{server.base_url}/slo/state", timeout=30.0).json()
        served = sum(sum(row["requests"].values()) for row in state["classes"])
        if served and state["steps"]:
            break
        assert time.monotonic() < until_s, state
        time.sleep(1.0)
    assert len(state["replicas"]) == 2 and all(row["requests"] is not None for row in state["replicas"])
    assert state["armed"] is True and state["verdicts"][0]["slo_class"] == "chat"
    assert {row["name"] for row in state["classes"]} >= {"chat", "code", "batch"}


def test_the_endpoint_shows_the_plugins_metrics_of_both_replicas(server: ServerProcess) -> None:
    complete(server, "chat")
    shown = httpx.get(f"{server.base_url}/metrics", timeout=30.0)
    assert shown.status_code == 200
    series = [line for line in shown.text.splitlines() if line.startswith("slos_serve:requests_total{")]
    assert len({line.partition('replica="')[2].partition('"')[0] for line in series}) == 2
    assert sum(float(line.rpartition(" ")[2]) for line in series) >= NUM_REQUESTS


def test_what_nobody_attains_is_refused_or_served_without_a_promise(server: ServerProcess, client: OpenAI) -> None:
    with pytest.raises(RateLimitError) as raised:
        client.completions.create(model=MODEL, prompt="x", extra_headers={"x-slo-class": "now"})
    assert raised.value.response.headers["retry-after"].isdecimal()
    assert raised.value.type == "rate_limit_error"
    answer = complete(server, "hopeless")
    assert answer.is_success and answer.headers["x-slo-verdict"] == "best-effort"
    assert int(answer.headers["x-slo-predicted-start-ms"]) >= 0 and answer.headers["x-slo-target-ttft-ms"].isdecimal()


def test_who_cannot_have_the_first_promise_is_told_the_next_and_its_replica_is_held_to_it(
    server: ServerProcess,
) -> None:
    answer = complete(server, "patient")
    said = answer.headers
    assert answer.is_success and (said["x-slo-verdict"], said["x-slo-rank"]) == ("second-best", "2")
    assert (said["x-slo-target-ttft-ms"], said["x-slo-target-tpot-ms"]) == ("60000", "5000")
    assert 0 < int(said["x-slo-predicted-ttft-ms"]) < 60_000
    found: Counter[str] = Counter()
    for _ in range(100):  # metrics leave the scheduler by a thread of their own
        found = engine_verdicts(server, "patient")
        if found:
            break
        time.sleep(0.1)
    assert found == {"second-best": 1}


def test_a_stream_ends_with_what_was_promised_and_measured(client: OpenAI) -> None:
    stream = client.completions.with_raw_response.create(
        model=MODEL,
        prompt="Hello",
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-slo-class": "chat"},
    )
    *_, last = stream.parse()
    assert last.usage is not None and last.usage.completion_tokens == 8
    said = (last.usage.model_extra or {})["slo"]
    assert (said["class"], said["verdict"]) == ("chat", stream.headers["x-slo-verdict"]) == ("chat", "admitted")
    assert said["ttft_ms"] > 0.0 and said["tpot_ms"] > 0.0
    assert f"{said['target_ttft_ms']:.0f}" == stream.headers["x-slo-target-ttft-ms"]
    assert f"{said['predicted_ttft_ms']:.0f}" == stream.headers["x-slo-predicted-ttft-ms"]


def test_an_slo_that_cannot_be_used_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as raised:
        client.completions.create(model=MODEL, prompt="x", extra_body={"vllm_xargs": {"slo_class": "gold"}})
    assert raised.value.param == "slo_class"


def test_the_last_round_of_a_session_gets_its_own_class(server: ServerProcess) -> None:
    answer = complete(server, "tool", vllm_xargs={"session_id": "s1"})
    assert answer.headers["x-slo-class"] == "tool"
    answer = complete(server, "tool", vllm_xargs={"session_id": "s1", "slo_last_round": 1})
    assert answer.headers["x-slo-class"] == "chat"


async def stream_once(client: httpx.AsyncClient, server: ServerProcess, index: int, begun: asyncio.Event) -> str:
    """``whole``, or how it ended otherwise."""
    body = {"model": MODEL, "prompt": f"Tell me of {index}:", "max_tokens": 40, "ignore_eos": True, "stream": True}
    url, count = f"{server.base_url}/v1/completions", 0
    async with client.stream("POST", url, json=body, headers={"x-slo-class": "chat"}) as answer:
        if not answer.is_success:
            return f"status {answer.status_code}: {(await answer.aread())[:200]!r}"
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            document = json.loads(line.removeprefix("data: "))
            if "error" in document:
                return str(document["error"]["type"])
            count += 1
            if count == 3:
                begun.set()
            if document["choices"][0]["finish_reason"] == "length":
                return "whole"  # an event may bring several tokens, so they are not counted
    return f"cut off after {count} events"


async def test_an_update_loses_no_request(server: ServerProcess, plan: ServeConfig, tmp_path: Path) -> None:
    """The same application with another class file: Ray replaces one replica after the other under load."""
    classes = tmp_path / "classes.yaml"
    classes.write_text(CLASSES + "  new: {ttft_ms: 60000, tpot_ms: 5000}\n", encoding="utf-8")
    old = set(titled(server.pid, ENGINES))
    environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": "auto"}
    command = command_of(
        plan.model_copy(update={"plugin": PluginConfig(classes_path=classes, profile_path=plan.plugin.profile_path)}),
        tmp_path / "plan.json",
    )
    ended: Counter[str] = Counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as update:
        try:
            async with httpx.AsyncClient(timeout=300.0) as client, asyncio.timeout(3 * REPLACED_WITHIN_S):
                while old & set(titled(server.pid, ENGINES)) or complete(server, "new").is_error:
                    sent = (stream_once(client, server, index, asyncio.Event()) for index in range(3))
                    ended.update(await asyncio.gather(*sent))
        finally:
            update.kill()  # a signal that it could handle would end the application
    assert set(ended) == {"whole"}, ended
    assert not old & set(titled(server.pid, ENGINES))
    wait_for_replicas(server, 2)


async def test_a_replica_killed_under_load_loses_nothing_and_is_replaced(server: ServerProcess) -> None:
    replicas = titled(server.pid, ENGINES)
    assert len(replicas) == 2
    begun = asyncio.Event()
    async with httpx.AsyncClient(timeout=300.0) as client:
        first = [asyncio.create_task(stream_once(client, server, index, begun)) for index in range(6)]
        await asyncio.wait_for(begun.wait(), timeout=120.0)
        os.kill(replicas[0], signal.SIGKILL)
        after = [asyncio.create_task(stream_once(client, server, index, begun)) for index in range(6, 12)]
        ended = Counter(await asyncio.gather(*first, *after))
    assert set(ended) <= {"whole", "replica_lost"}, ended
    assert ended["whole"] >= 6 and ended["replica_lost"] >= 1, ended
    wait_for_replicas(server, 2)
    answers = [complete(server) for _ in range(6)]
    assert {answer.headers["x-slo-verdict"] for answer in answers} == {"admitted"}
