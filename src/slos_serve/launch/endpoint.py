"""Where a server listens and how one asks whether it is ready: TCP or a Unix socket, plain or TLS, or not at all."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict

from slos_serve.core.errors import InvalidFieldError
from slos_serve.launch.options import expanded, option_value, option_values

DEFAULT_PORT = 8000
_LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_ASK_TIMEOUT_S = 2.0


class Endpoint(BaseModel):
    """The HTTP side of one server.

    Attributes:
        host: address it listens on; ``None`` is every interface, vLLM's default.
        port: its TCP port.
        uds: path of the Unix socket that it listens on instead.
        ssl_certfile, ssl_keyfile, ssl_ca_certs: files of TLS; plain HTTP without a key and a certificate.
        headless: it has no HTTP side (vLLM's ``--headless``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str | None = None
    port: int = DEFAULT_PORT
    uds: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    headless: bool = False

    @classmethod
    def of_arguments(cls, arguments: Sequence[str]) -> Self:
        """What vLLM's arguments say, ``--config FILE`` included.

        Raises:
            InvalidFieldError: the port is none, or the configuration file cannot be read.
        """
        words = expanded(arguments)
        return cls(
            host=option_value(words, "--host"),
            port=_port(option_value(words, "--port")),
            uds=option_value(words, "--uds"),
            ssl_certfile=option_value(words, "--ssl-certfile"),
            ssl_keyfile=option_value(words, "--ssl-keyfile"),
            ssl_ca_certs=option_value(words, "--ssl-ca-certs"),
            headless=option_values(words, "--headless") is not None,
        )

    @property
    def is_tls(self) -> bool:
        """Whether it speaks TLS; vLLM does when key and certificate are given."""
        return self.ssl_certfile is not None and self.ssl_keyfile is not None

    @property
    def reachable_host(self) -> str:
        """Address that this machine reaches it by."""
        host = (self.host or "").strip("[]")
        return _LOOPBACK.get(host, host)

    @property
    def base_url(self) -> str:
        """URL for clients on this machine, without ``/v1``."""
        if self.headless:
            return "no HTTP endpoint (headless)"
        if self.uds is not None:
            return f"unix:{self.uds}"
        host = self.reachable_host
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self.is_tls else 'http'}://{shown}:{self.port}"

    def answers(self) -> bool:
        """Whether ``/health`` gives 200 now."""
        if self.headless:
            return False
        connection = self._connection()
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def is_taken(self) -> bool:
        """Whether something listens there already, whatever it speaks."""
        if self.headless or self.uds is not None:
            return False  # vLLM replaces a socket file that is left over
        try:
            with socket.create_connection((self.reachable_host, self.port), timeout=_ASK_TIMEOUT_S):
                return True
        except OSError:
            return False

    def _connection(self) -> http.client.HTTPConnection:
        if self.uds is not None:
            return _UnixConnection(self.uds)
        if not self.is_tls:
            return http.client.HTTPConnection(self.reachable_host, self.port, timeout=_ASK_TIMEOUT_S)
        context = ssl.create_default_context()
        # Our own server, whose certificate is for the name that clients use. Nothing is sent but GET /health.
        context.check_hostname = False
        if _is_loopback(self.reachable_host):
            context.verify_mode = ssl.CERT_NONE
        else:
            context.load_verify_locations(self.ssl_certfile)
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if self.ssl_ca_certs is not None and self.ssl_certfile is not None:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)  # it may ask for a client's certificate
        return http.client.HTTPSConnection(self.reachable_host, self.port, timeout=_ASK_TIMEOUT_S, context=context)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_ASK_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket file."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise InvalidFieldError("--port", text, "a whole number in [1, 65535]")
    return int(text)


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
