"""Open-loop streaming client: sends each request when it is due, whatever became of those before it.

Works with any OpenAI-compatible server. Assumes nothing of the server but the streaming API; what is known of vLLM
(``/version``) is used for exact token counts. Times come from one monotonic clock, read as soon as bytes arrive. The
client's own lateness is part of the result: a client that cannot keep the schedule measures itself.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from slos_serve.bench.requests import BenchRequest, LoadResult, Response
from slos_serve.bench.stream import AnswerReader, EventSplitter, StreamError, error_text
from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.metrics.summary import Outcome
from slos_serve.profiling.stolen_time import stolen_s

CLASS_HEADER = "x-slo-class"
VERDICT_HEADER, REASON_HEADER = "x-slo-verdict", "x-slo-reason"
_REJECTED_STATUS = (429, 503)
_LONGEST_ERROR = 300
_STOLEN_EVERY_S = 0.25
_LOOK_EVERY_S = 0.5
# Servers close idle connections, vLLM after 5 s; one that is used just then loses its request.
KEEP_ALIVE_S = 2.0


class ServerUnreachableError(SlosServeError):
    """No OpenAI-compatible server answers at the given address."""


class NoModelError(ServerUnreachableError):
    """The server answers and lists no model; waiting does not help."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How requests are sent.

    Attributes:
        base_url: with or without the trailing ``/v1``.
        model: model name in the request; ``None`` takes the first one that the server lists.
        chat: chat endpoint, else plain completions.
        slo_in: where the SLO goes: "headers", "body" (``vllm_xargs``) or "none" (it is only scored).
        timeout_s: limit for one request from sending to its last byte.
        wait_s: how long to wait for the server to answer at first.
        api_key: bearer token.
        temperature: 0 is greedy.
        keep_text: keep the answers.
        want_token_ids: ask for output token ids (vLLM), needed for stages that end with a token.
        extra_body: more fields for every request.
    """

    base_url: str
    model: str | None = None
    chat: bool = True
    slo_in: str = "headers"
    timeout_s: float = 600.0
    wait_s: float = 0.0
    api_key: str | None = field(default=None, repr=False)
    temperature: float = 0.0
    keep_text: bool = False
    want_token_ids: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidFieldError("base_url", self.base_url, "http://HOST:PORT or https://HOST[:PORT]")
        if self.slo_in not in ("headers", "body", "none"):
            raise InvalidFieldError("slo_in", self.slo_in, "one of ['headers', 'body', 'none']")

    @property
    def api_url(self) -> str:
        """Address of the API's root, ending in ``/v1``."""
        root = self.base_url.rstrip("/")
        return root if root.endswith("/v1") else root + "/v1"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server says about itself; ``vllm_version`` is ``None`` on any other server."""

    model: str
    vllm_version: str | None


class LoadClient:
    """A session with one server. Use as ``async with LoadClient(settings) as client``."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._server: ServerInfo | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._settings.api_key}"} if self._settings.api_key else {}
        # An open loop must not queue in its own connection pool, and time limits are set per request.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None),
            headers=headers,
        )
        try:
            self._server = await self._wait_for_server()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open_session.close()

    @property
    def server(self) -> ServerInfo:
        """The server, once entered."""
        if self._server is None:
            raise SlosServeError("LoadClient is used outside 'async with'")
        return self._server

    @property
    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise SlosServeError("LoadClient is used outside 'async with'")
        return self._session

    async def _wait_for_server(self) -> ServerInfo:
        ends_s = time.monotonic() + self._settings.wait_s
        while True:
            try:
                return await self._find_server()
            except ServerUnreachableError as fault:
                if isinstance(fault, NoModelError) or time.monotonic() >= ends_s:
                    raise
            await asyncio.sleep(_LOOK_EVERY_S)

    async def run(
        self, requests: Sequence[BenchRequest], on_end: Callable[[Response], None] | None = None
    ) -> LoadResult:
        """Send every request when it is due, those that follow it after its answer, and wait for the last answer.

        Args:
            requests: in any order; ``arrival_s`` counts from now.
            on_end: called as each request ends, for progress.
        """
        ordered = sorted(requests, key=lambda request: request.arrival_s)
        responses, followed = [Response(request) for request in ordered], list[Response]()
        started_unix_s, zero_s = time.time(), time.perf_counter()
        stolen: list[tuple[float, float]] = []
        watch = asyncio.create_task(_watch_stolen(zero_s, stolen))
        try:
            async with asyncio.TaskGroup() as tasks:
                for response in responses:
                    wait_s = response.request.arrival_s - (time.perf_counter() - zero_s)
                    if wait_s > 0.0:
                        await asyncio.sleep(wait_s)
                    tasks.create_task(self._send_task(response, zero_s, on_end, followed))
        finally:
            watch.cancel()
        responses = sorted([*responses, *followed], key=lambda response: response.request.arrival_s)
        return LoadResult(responses, time.perf_counter() - zero_s, started_unix_s, stolen)

    async def _send_task(
        self, first: Response, zero_s: float, on_end: Callable[[Response], None] | None, followed: list[Response]
    ) -> None:
        """Send a request and, one after the other, those that follow it; answers to these are appended."""
        response = first
        while True:
            await self._send(response, zero_s, on_end)
            following = response.request.then
            if following is None or response.outcome is not Outcome.COMPLETED:
                return
            await asyncio.sleep(following.pause_s)
            response = Response(replace(following.request, arrival_s=time.perf_counter() - zero_s))
            followed.append(response)

    async def _send(self, response: Response, zero_s: float, on_end: Callable[[Response], None] | None) -> None:
        """Send one request; every failure becomes part of its response."""
        response.sent_s = time.perf_counter() - zero_s
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._exchange(response, zero_s)
        except TimeoutError:
            response.error = f"no end within {self._settings.timeout_s:g} s"
        except (aiohttp.ClientError, ConnectionError, StreamError) as error:
            response.error = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
        response.ended_s = time.perf_counter() - zero_s
        if on_end is not None:
            on_end(response)

    async def _exchange(self, response: Response, zero_s: float) -> None:
        path = "/chat/completions" if self._settings.chat else "/completions"
        async with self._open_session.post(
            self._settings.api_url + path,
            data=json.dumps(self._body(response.request)),
            headers=self._headers(response.request),
        ) as http:
            response.status = http.status
            response.class_applied = http.headers.get(CLASS_HEADER)
            response.verdict = http.headers.get(VERDICT_HEADER)
            response.reason = http.headers.get(REASON_HEADER)
            if http.status != 200:
                await _read_refusal(http, response)
                return
            splitter, reader = EventSplitter(), AnswerReader(response, self._settings.keep_text)
            try:
                while received := await http.content.readany():
                    at_s = time.perf_counter() - zero_s
                    for payload in splitter.feed(received):
                        reader.read(payload, at_s)
            finally:
                reader.finish()
            if not reader.done and response.finish_reason is None:
                raise StreamError("the stream ended before the answer did")
            response.outcome = Outcome.COMPLETED

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        stream_options: dict[str, Any] = {"include_usage": True}
        body: dict[str, Any] = {
            "model": self.server.model,
            "max_tokens": request.max_tokens,
            "temperature": self._settings.temperature,
            "stream": True,
            "stream_options": stream_options,
        }
        if self._settings.chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if self.server.vllm_version is not None:
            stream_options["continuous_usage_stats"] = True
            if self._settings.want_token_ids:
                body["return_token_ids"] = True
        if request.ignore_eos:
            body["ignore_eos"] = True
        if self._settings.slo_in == "body" and (xargs := _slo_fields(request)):
            body["vllm_xargs"] = xargs
        return body | dict(self._settings.extra_body) | dict(request.extra)

    def _headers(self, request: BenchRequest) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "X-Request-Id": request.request_id}
        if self._settings.slo_in == "headers":
            names = {"slo_class": CLASS_HEADER}
            names |= {f"slo_{key}_ms": f"x-slo-{key}-ms" for key in ("ttft", "tpot", "e2e", "task")}
            names |= {"session_id": "x-session-id", "slo_last_round": "x-slo-last-round"}
            headers |= {names[key]: f"{value}" for key, value in _slo_fields(request).items()}
        return headers

    async def _find_server(self) -> ServerInfo:
        model = self._settings.model or await self._first_model()
        root = self._settings.api_url.removesuffix("/v1")
        _, version = await self._get_json(root + "/version")
        found = version.get("version") if isinstance(version, dict) else None
        return ServerInfo(model, found if isinstance(found, str) else None)

    async def _first_model(self) -> str:
        url = self._settings.api_url + "/models"
        status, listed = await self._get_json(url)
        if status >= 500:
            raise ServerUnreachableError(f"{url} answers {status}; is the server still starting?")
        if status in (401, 403):
            raise NoModelError(f"{url} answers {status}; set OPENAI_API_KEY to a key of the server")
        if status != 200:
            raise NoModelError(f"{url} answers {status}; is the address right, or the server still starting?")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise NoModelError(f"{url} lists no model; name one with --model") from None

    async def _get_json(self, url: str) -> tuple[int, Any]:
        """The status and the JSON at an address; ``None`` when the server has something else there."""
        status = 200
        try:
            async with asyncio.timeout(10.0), self._open_session.get(url) as http:
                status = http.status
                return status, await http.json(content_type=None) if status == 200 else None
        except ValueError:
            return status, None
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise ServerUnreachableError(
                f"no answer from {url} ({reason}); is the server up? Start one with 'slos-serve serve MODEL'"
            ) from error


async def _watch_stolen(zero_s: float, stolen: list[tuple[float, float]]) -> None:
    """Append how much of this machine a hypervisor took, where the count changes."""
    before_s = stolen_s()
    while True:
        now_s, taken_s = time.perf_counter() - zero_s, stolen_s() - before_s
        if len(stolen) > 1 and stolen[-1][1] == stolen[-2][1] == taken_s:
            stolen.pop()
        stolen.append((now_s, taken_s))
        await asyncio.sleep(_STOLEN_EVERY_S)


async def _read_refusal(http: aiohttp.ClientResponse, response: Response) -> None:
    raw = await http.read()
    try:
        response.error = error_text(json.loads(raw))[:_LONGEST_ERROR]
    except ValueError:
        response.error = raw.decode("utf-8", "replace")[:_LONGEST_ERROR]
    response.error = response.error or f"HTTP {http.status}"
    if http.status in _REJECTED_STATUS:
        response.outcome = Outcome.REJECTED
    retry_after = http.headers.get("Retry-After", "")
    response.retry_after_s = float(retry_after) if retry_after.isdigit() else None


def _slo_fields(request: BenchRequest) -> dict[str, str | float]:
    """What the request says about its SLO, by its name in ``vllm_xargs``; only what it says itself."""
    given: dict[str, str | float | None] = {"slo_class": request.slo_class, "slo_ttft_ms": request.ttft_ms}
    given |= {"slo_tpot_ms": request.tpot_ms, "slo_e2e_ms": request.e2e_ms, "slo_task_ms": request.task_ms}
    given |= {"session_id": request.session, "slo_last_round": 1 if request.last_call else None}
    return {key: value for key, value in given.items() if value is not None}
