"""What is not sent as JSON is refused before FastAPI sees it."""

from __future__ import annotations

import pytest
from fastapi import Body, FastAPI
from starlette.testclient import TestClient

pytest.importorskip("ray.serve.llm")

from slos_serve.ray_serve.json_only import JsonOnly

BODY = b'{"prompt": "One, two,"}'


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(JsonOnly)

    @app.post("/v1/completions")
    def complete(body: dict[str, str] = Body()) -> dict[str, str]:  # noqa: B008
        return body

    @app.post("/v1/audio/transcriptions")
    def transcribe() -> str:
        return "heard"

    return TestClient(app)


@pytest.mark.parametrize("given", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_is_served(client: TestClient, given: str) -> None:
    answer = client.post("/v1/completions", content=BODY, headers={"content-type": given})
    assert (answer.status_code, answer.json()) == (200, {"prompt": "One, two,"})


@pytest.mark.parametrize("headers", [{"content-type": "application/x-www-form-urlencoded"}, {}])
def test_anything_else_is_refused_with_what_is_wanted(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/v1/completions", content=BODY, headers=headers)
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert error["param"] == "content-type"
    assert error["code"] == 415
    assert "application/json" in error["message"]
    assert (headers.get("content-type") or "not given") in error["message"]


def test_other_paths_take_what_they_take(client: TestClient) -> None:
    assert client.post("/v1/audio/transcriptions", content=b"RIFF").status_code == 200
