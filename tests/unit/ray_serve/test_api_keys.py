"""The Ray endpoint asks for a key, and nothing that Ray stores holds one."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from slos_serve.core.errors import InvalidFieldError
from slos_serve.ray_serve.api_keys import ApiKeyRequired, take_keys
from slos_serve.vllm_plugin.api_keys import KeyDigests

KEYS = ("sk-one", "sk-two")


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.add_middleware(ApiKeyRequired, keys=KeyDigests.of(KEYS))

    @app.post("/v1/completions")
    def complete() -> str:
        return "answer"

    @app.get("/health")
    def health() -> str:
        return "ok"

    with TestClient(app) as found:
        yield found


@pytest.mark.parametrize("given", ["Bearer sk-one", "bearer sk-one", "Bearer  sk-two"])
def test_a_known_key_is_served(client: TestClient, given: str) -> None:
    assert client.post("/v1/completions", headers={"authorization": given}).status_code == 200


@pytest.mark.parametrize("given", [None, "", "sk-one", "Bearer", "Bearer sk-on", "Bearer sk-one2", "Basic sk-one"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/docs", "/metrics", "/nothing"])
def test_anything_else_is_401(client: TestClient, given: str | None, path: str) -> None:
    answer = client.post(path, headers={} if given is None else {"authorization": given})
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("authentication_error", "authorization", 401)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_probes_and_preflights_need_no_key(client: TestClient) -> None:
    assert client.get("/health").status_code == 200
    assert client.options("/v1/completions").status_code == 405


def test_what_ray_stores_holds_no_key() -> None:
    stored = pickle.dumps(KeyDigests.of(KEYS))
    assert not any(key.encode() in stored for key in KEYS)
    assert KeyDigests.of(KEYS).digests != KeyDigests.of(KEYS).digests, "salted"


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ({}, ()),
        ({"VLLM_API_KEY": "a"}, ("a",)),
        ({"VLLM_API_KEY": "a", "SLOS_SERVE_API_KEYS": '["b", "c"]'}, ("b", "c")),
    ],
)
def test_keys_leave_the_environment(given: dict[str, str], keys: tuple[str, ...]) -> None:
    environment = {**given, "PATH": "p"}
    assert take_keys(environment) == keys
    assert environment == {"PATH": "p"}


@pytest.mark.parametrize("given", ["secret", '{"a": 1}', "[1]", '[""]'])
def test_a_list_that_cannot_be_read_is_not_shown(given: str) -> None:
    with pytest.raises(InvalidFieldError, match="SLOS_SERVE_API_KEYS") as caught:
        take_keys({"SLOS_SERVE_API_KEYS": given})
    assert given not in str(caught.value)
