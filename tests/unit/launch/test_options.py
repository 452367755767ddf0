"""What vLLM's arguments say about the HTTP side, as vLLM reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.launch.endpoint import Endpoint
from slos_serve.launch.options import expanded, option_value, option_values, with_config_apart, without_option
from slos_serve.launch.server import server_command, with_key_in_environment


@pytest.mark.parametrize(
    ("given", "values"),
    [
        (["--api-key", "a", "b", "--x"], ["a", "b"]),
        (["--api_key=a"], ["a"]),
        (["--api-key"], []),
        (["--api-key", "a", "--api-key=b"], ["b"]),
        (["--seed", "-1"], None),
    ],
)
def test_values_of_an_option(given: list[str], values: list[str] | None) -> None:
    assert option_values(given, "--api-key") == values
    assert option_value(["--seed", "-1"], "--seed") == "-1"


def test_an_option_is_taken_out_with_its_values() -> None:
    given = ["--a", "1", "--api-key", "x", "y", "--port=5", "--port", "6", "pos"]
    assert without_option(given, "--port") == ["--a", "1", "--api-key", "x", "y", "pos"]
    assert without_option(given, "--api-key", None) == ["--a", "1", "--port=5", "--port", "6", "pos"]


def test_a_configuration_file_counts_before_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text("host: 0.0.0.0\nport: 9001\nenforce-eager: true\nquiet: false\napi-key: [k]\nx: {a: 1}\n")
    given = ["--config", str(path), "--port", "9002"]
    assert expanded(given) == [
        *("--host", "0.0.0.0", "--port", "9001", "--enforce-eager", "--api-key", "k", "--x", '{"a": 1}'),
        *("--port", "9002"),
    ]
    assert Endpoint.of_arguments(given) == Endpoint(host="0.0.0.0", port=9002)
    assert Endpoint.of_arguments(given[:2]).port == 9001


def test_a_configuration_file_is_given_in_two_words() -> None:
    assert with_config_apart(["--config=a.yaml", "--x=1", "--config", "b"]) == [
        *("--config", "a.yaml", "--x=1", "--config", "b")
    ]


@pytest.mark.parametrize("text", ["- a\n", "a: [", None])
def test_a_configuration_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "vllm.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidFieldError, match=r"--config.*vllm\.yaml"):
        expanded(["--config", str(path)])


def test_the_default_address_is_vllms() -> None:
    found = Endpoint.of_arguments([])
    assert (found.host, found.port, found.base_url) == (None, 8000, "http://127.0.0.1:8000")
    assert "--host" not in server_command("m", endpoint=found), "vLLM then listens on every interface"


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (["--host", "::"], "http://[::1]:8000"),
        (["--host", "10.0.0.5", "--port", "1"], "http://10.0.0.5:1"),
        (["--ssl-certfile", "c", "--ssl-keyfile", "k"], "https://127.0.0.1:8000"),
        (["--ssl-certfile", "c"], "http://127.0.0.1:8000"),
        (["--uds", "/run/v.sock"], "unix:/run/v.sock"),
        (["--headless"], "no HTTP endpoint (headless)"),
    ],
)
def test_where_clients_reach_it(given: list[str], url: str) -> None:
    assert Endpoint.of_arguments(given).base_url == url


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_is_none_is_named(port: str) -> None:
    with pytest.raises(InvalidFieldError, match=r"--port.*\[1, 65535\]"):
        Endpoint.of_arguments(["--port", port])


@pytest.mark.parametrize("given", [["--headless"], ["--api-server-count", "2"], ["-asc", "2"]])
def test_what_only_vllms_command_line_acts_on_is_started_by_it(given: list[str]) -> None:
    command = server_command("m", given, endpoint=Endpoint.of_arguments(given))
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "m"]
    assert ("--port" in command) is (given != ["--headless"])


def test_a_socket_replaces_host_and_port() -> None:
    command = server_command("m", ["--uds", "/run/v.sock"], endpoint=Endpoint(uds="/run/v.sock"))
    assert command[5:] == ["--uds", "/run/v.sock"]


def test_one_key_leaves_the_command_line() -> None:
    assert with_key_in_environment(["--api-key", "k", "--x"]) == (("--x",), {"VLLM_API_KEY": "k"})
    assert with_key_in_environment(["--api-key", "k", "l"]) == (("--api-key", "k", "l"), {})
    assert with_key_in_environment(["--x"]) == (("--x",), {})
