"""Bodies and requests that an endpoint holds at most."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("starlette")

from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from slos_serve.ray_serve.bounds import Bounds

PATH = "/v1/completions"
CALL = {"type": "http", "method": "POST", "path": PATH, "headers": []}


def served(max_bytes: int = 1000) -> TestClient:
    app = FastAPI()

    @app.post(PATH)
    async def complete(body: dict[str, Any]) -> dict[str, int]:
        return {"keys": len(body)}

    @app.post("/v1/other")
    async def other(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    app.add_middleware(Bounds, max_bytes=max_bytes, max_requests=2)
    return TestClient(app)


def in_parts(sizes: Sequence[int]) -> Any:
    yield from (b" " * size for size in sizes)


@pytest.mark.parametrize("path", [PATH, "/v1/other"])
@pytest.mark.parametrize("parts", [None, (600, 600)])
def test_a_body_over_the_bound_is_answered_413(path: str, parts: Sequence[int] | None) -> None:
    content = b" " * 1001 if parts is None else in_parts(parts)
    answer = served().post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["param"] == "body"


def test_a_body_at_the_bound_passes() -> None:
    body = json.dumps({"a": "x" * 989}).encode()
    answer = served(len(body)).post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.json() == {"keys": 1}


async def call(app: Bounds, path: str = PATH) -> tuple[int, dict[bytes, bytes]]:
    heads: list[Any] = []

    async def send(message: Any) -> None:
        heads.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    await app({**CALL, "path": path}, receive, send)
    return heads[0]["status"], dict(heads[0]["headers"])


async def test_requests_over_the_bound_are_told_when_to_come_back_and_not_all_at_once() -> None:
    go_on = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if scope["path"] == PATH:
            await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    app = Bounds(slow, max_bytes=10, max_requests=2)
    running = [asyncio.create_task(call(app)) for _ in range(2)]
    await asyncio.sleep(0)
    refused = [await call(app) for _ in range(50)]
    assert {status for status, _ in refused} == {503}
    waits = {int(headers[b"retry-after"]) for _, headers in refused}
    assert len(waits) > 1 and min(waits) >= 2
    assert (await call(app, "/v1/models"))[0] == 200
    go_on.set()
    assert [status for status, _ in await asyncio.gather(*running)] == [200, 200]
    assert (await call(app))[0] == 200


async def test_a_request_that_fails_gives_its_place_back() -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("no")

    app = Bounds(failing, max_bytes=10, max_requests=1)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            await call(app)
