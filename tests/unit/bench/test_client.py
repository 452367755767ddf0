"""The load client against a scripted server: what is sent, what is noted, and every way an answer can fail."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from slos_serve.bench.client import ClientSettings, LoadClient, ServerUnreachableError
from slos_serve.bench.requests import BenchRequest, FollowUp, LoadResult, Response
from slos_serve.core.errors import InvalidFieldError
from slos_serve.metrics.summary import Outcome
from tests.unit.bench.sse_server import Call, Script, SseServer, chat_chunk, sse_server, usage


def request_for(script: str, arrival_s: float = 0.0, slo_class: str | None = "chat") -> BenchRequest:
    return BenchRequest(f"id-{script}", arrival_s, script, 8, slo_class)


async def three_tokens(call: Call) -> None:
    await call.start("200 OK", "x-slo-class: chat")
    for count, text in enumerate(("a", "b", "c"), start=1):
        await call.event(chat_chunk(text, "stop" if count == 3 else None) | usage(7, count))
    await call.event({"choices": []} | usage(7, 3))
    await call.event("[DONE]")


async def cut_short(call: Call) -> None:
    await call.start()
    await call.event(chat_chunk("a"))


async def error_event(call: Call) -> None:
    await call.start()
    await call.event(chat_chunk("a"))
    await call.event({"error": {"message": "engine died"}})


async def too_busy(call: Call) -> None:
    await call.start("429 Too Many Requests", "Retry-After: 7")
    call.writer.write(b'{"error": {"message": "class chat is full"}}')
    await call.writer.drain()


async def no_capacity(call: Call) -> None:
    await call.start("503 Service Unavailable")


async def bad_request(call: Call) -> None:
    await call.start("400 Bad Request")
    call.writer.write(b"plain words")
    await call.writer.drain()


async def reset(call: Call) -> None:
    call.writer.transport.abort()


async def silent(call: Call) -> None:
    await call.start()
    await asyncio.Event().wait()


SCRIPTS: dict[str, Script] = {
    "three": three_tokens,
    "cut": cut_short,
    "error_event": error_event,
    "busy": too_busy,
    "full": no_capacity,
    "bad": bad_request,
    "reset": reset,
    "silent": silent,
}
QUICK = ClientSettings("http://placeholder", timeout_s=5.0, keep_text=True)


def drive(
    requests: Sequence[BenchRequest], settings: ClientSettings = QUICK, version: str | None = "0.32.0"
) -> tuple[LoadResult, SseServer]:
    """Send ``requests`` to a scripted server and wait for all of them."""

    async def both() -> tuple[LoadResult, SseServer]:
        async with (
            sse_server(SCRIPTS, version) as server,
            LoadClient(replace(settings, base_url=server.url)) as client,
        ):
            return await client.run(requests), server

    return asyncio.run(both())


def test_answer_is_counted_and_timed() -> None:
    result, server = drive([request_for("three")])
    (response,) = result.responses
    assert (response.outcome, response.status, response.error) == (Outcome.COMPLETED, 200, "")
    assert (response.prompt_tokens, response.output_tokens, response.text) == (7, 3, "abc")
    assert sum(response.chunk_tokens) == 3
    times = [response.sent_s, *response.chunk_times_s, response.ended_s]
    assert times == sorted(times)
    assert response.class_applied == "chat"
    assert result.wall_s >= response.ended_s
    assert server.calls[0].headers["x-request-id"] == "id-three"


def test_body_is_what_the_api_and_vllm_ask_for() -> None:
    _, server = drive([request_for("three")])
    body = server.calls[0].body
    assert server.calls[0].path == "/v1/chat/completions"
    assert body["model"] == "tiny" and body["max_tokens"] == 8 and body["stream"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert "ignore_eos" not in body and "vllm_xargs" not in body


def test_another_server_gets_no_extensions() -> None:
    _, server = drive([request_for("three")], replace(QUICK, chat=False, want_token_ids=True), version=None)
    body = server.calls[0].body
    assert server.calls[0].path == "/v1/completions"
    assert body["stream_options"] == {"include_usage": True}
    assert body["prompt"] == "three" and "return_token_ids" not in body


@pytest.mark.parametrize("slo_in", ["headers", "body", "none"])
def test_slo_goes_where_it_is_wanted(slo_in: str) -> None:
    request = replace(request_for("three"), ttft_ms=900.0)
    _, server = drive([request], replace(QUICK, slo_in=slo_in))
    headers, body = server.calls[0].headers, server.calls[0].body
    in_headers = (headers.get("x-slo-class"), headers.get("x-slo-ttft-ms"))
    assert in_headers == (("chat", "900.0") if slo_in == "headers" else (None, None))
    expected = {"slo_class": "chat", "slo_ttft_ms": 900.0} if slo_in == "body" else None
    assert body.get("vllm_xargs") == expected


def test_request_without_slo_says_nothing_about_it() -> None:
    _, server = drive([request_for("three", slo_class=None)], replace(QUICK, slo_in="body"))
    assert "vllm_xargs" not in server.calls[0].body
    assert not any(name.startswith("x-slo") for name in server.calls[0].headers)


@pytest.mark.parametrize(
    ("script", "outcome", "status", "says"),
    [
        ("busy", Outcome.REJECTED, 429, "class chat is full"),
        ("full", Outcome.REJECTED, 503, "HTTP 503"),
        ("bad", Outcome.ERROR, 400, "plain words"),
        ("cut", Outcome.ERROR, 200, "ended before"),
        ("error_event", Outcome.ERROR, 200, "engine died"),
        ("reset", Outcome.ERROR, 0, "disconnect"),
    ],
)
def test_every_failure_is_noted(script: str, outcome: Outcome, status: int, says: str) -> None:
    result, _ = drive([request_for(script), request_for("three")])
    failed, fine = result.responses
    assert (failed.outcome, failed.status) == (outcome, status)
    assert says in failed.error
    assert fine.outcome is Outcome.COMPLETED, "one failure must not touch the others"


def test_rejection_carries_retry_after() -> None:
    result, _ = drive([request_for("busy")])
    assert result.responses[0].retry_after_s == 7.0


def test_tokens_before_a_cut_are_kept() -> None:
    result, _ = drive([request_for("cut")])
    assert result.responses[0].output_tokens == 1


def test_a_silent_server_ends_in_a_timeout() -> None:
    result, _ = drive([request_for("silent")], replace(QUICK, timeout_s=0.05))
    assert result.responses[0].outcome is Outcome.ERROR
    assert "no end within 0.05 s" in result.responses[0].error


def test_arrivals_do_not_wait_for_answers() -> None:
    ended: list[Response] = []

    async def both() -> list[str]:
        async with sse_server(SCRIPTS) as server:
            settings = replace(QUICK, base_url=server.url, timeout_s=0.3)
            async with LoadClient(settings) as client:
                await client.run([request_for("silent"), request_for("three", 0.001)], ended.append)
            return [call.body["messages"][0]["content"] for call in server.calls]

    assert asyncio.run(both()) == ["silent", "three"]
    assert [response.request.prompt for response in ended] == ["three", "silent"]


def test_responses_come_in_order_of_arrival_and_lag_is_known() -> None:
    result, _ = drive([request_for("three", 0.01), request_for("cut", 0.0)])
    assert [response.request.prompt for response in result.responses] == ["cut", "three"]
    assert all(response.lag_s >= 0.0 for response in result.responses)


@pytest.mark.parametrize(
    ("statuses", "says"),
    [
        (["401 Unauthorized"], "OPENAI_API_KEY"),
        (["404 Not Found"], "answers 404"),
        (["503 Service Unavailable", "503 Service Unavailable"], "still starting"),
    ],
)
def test_a_server_that_does_not_list_its_models_says_why(
    monkeypatch: pytest.MonkeyPatch, statuses: list[str], says: str
) -> None:
    monkeypatch.setattr("slos_serve.bench.client._LOOK_EVERY_S", 0.0)

    async def look(wait_s: float) -> str:
        async with sse_server({}) as server:
            server.statuses = list(statuses)
            settings = ClientSettings(server.url, model=None, wait_s=wait_s)
            async with LoadClient(settings) as client:
                return client.server.model

    with pytest.raises(ServerUnreachableError, match=says):
        asyncio.run(look(0.0))
    if says == "still starting":
        assert asyncio.run(look(30.0)) == "tiny"


def test_no_server_is_one_clear_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"

        async def enter() -> None:
            async with LoadClient(replace(QUICK, base_url=url)):
                pass

        with pytest.raises(ServerUnreachableError, match="is the server up"):
            asyncio.run(enter())


@pytest.mark.parametrize("changes", [{"base_url": "localhost:8000"}, {"slo_in": "cookie"}])
def test_settings_are_checked(changes: dict[str, str]) -> None:
    with pytest.raises(InvalidFieldError):
        replace(QUICK, **changes)  # type: ignore[arg-type]  # the keys are fields that hold strings


def test_runs_one_behind_the_other_add_up_what_was_stolen() -> None:
    first = LoadResult([], 10.0, 0.0, stolen=[(0.0, 0.0), (9.0, 2.0)])
    second = LoadResult([], 5.0, 20.0, stolen=[(0.5, 0.0), (4.0, 1.0)])
    assert first.then(second).stolen == [(0.0, 0.0), (9.0, 2.0), (10.5, 2.0), (14.0, 3.0)]


def task_of_calls(*scripts: str) -> BenchRequest:
    """Calls of one task, each after a short pause."""
    following: FollowUp | None = None
    for number, script in reversed(list(enumerate(scripts))):
        last = number == len(scripts) - 1
        call = replace(
            request_for(script), request_id=f"t-{number}", session="t", task_ms=9000.0, last_call=last, then=following
        )
        following = FollowUp(0.02, call)
    assert following is not None
    return following.request


def test_calls_of_a_task_follow_each_other_and_name_it() -> None:
    result, server = drive([task_of_calls("three", "three", "three"), request_for("three", 0.01)])
    calls = [response for response in result.responses if response.request.session == "t"]
    assert [response.request.request_id for response in calls] == ["t-0", "t-1", "t-2"]
    assert len(result.responses) == 4
    for before, after in pairwise(calls):
        assert after.sent_s >= before.ended_s + 0.02
        assert after.request.arrival_s == pytest.approx(after.sent_s, abs=0.05)
    sent = {call.headers["x-request-id"]: call.headers for call in server.calls if "x-request-id" in call.headers}
    for number in range(3):
        headers = sent[f"t-{number}"]
        assert (headers["x-session-id"], headers["x-slo-task-ms"]) == ("t", "9000.0")
        assert headers.get("x-slo-last-round") == ("1" if number == 2 else None)
    assert "x-session-id" not in sent["id-three"]


def test_a_task_breaks_off_with_a_call_that_fails() -> None:
    result, _ = drive([task_of_calls("three", "busy", "three")])
    assert [response.outcome for response in result.responses] == [Outcome.COMPLETED, Outcome.REJECTED]
