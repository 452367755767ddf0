"""Readiness over TCP, TLS and a Unix socket, against small servers."""

from __future__ import annotations

import http.server
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slos_serve.launch.endpoint import Endpoint


class Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=example.org"]
    files = folder / "cert.pem", folder / "key.pem"
    subprocess.run([*command, "-out", str(files[0]), "-keyout", str(files[1])], check=True, capture_output=True)
    return files


def test_tls_readiness_takes_our_own_certificate(certificate: tuple[Path, Path]) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*map(str, certificate))
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    port = server.server_address[1]
    tls = Endpoint(host="0.0.0.0", port=port, ssl_certfile=str(certificate[0]), ssl_keyfile=str(certificate[1]))
    with serving(server):
        assert tls.base_url == f"https://127.0.0.1:{port}"
        assert tls.answers()
        assert not Endpoint(host="127.0.0.1", port=port).answers(), "plain HTTP is never answered"
        assert tls.is_taken()
    assert not tls.answers() and not tls.is_taken()


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"

    class Server(socketserver.UnixStreamServer):
        def get_request(self) -> tuple[object, tuple[str, int]]:  # type: ignore[override]
            return super().get_request()[0], ("local", 0)

    endpoint = Endpoint(uds=str(path))
    assert not endpoint.answers()
    with serving(Server(str(path), Health)):
        assert endpoint.answers()
    assert not endpoint.is_taken()


def test_a_server_that_is_not_healthy_yet_is_not_ready() -> None:
    class Starting(Health):
        status = 503

    server = http.server.HTTPServer(("127.0.0.1", 0), Starting)
    endpoint = Endpoint(host="127.0.0.1", port=server.server_address[1])
    with serving(server):
        assert endpoint.is_taken() and not endpoint.answers()
    assert not Endpoint(headless=True).answers()
