"""Ports that replicas publish on: a range, so that a firewall or a NetworkPolicy can name it."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

import zmq

from slos_serve.core.errors import InvalidFieldError, SlosServeError

PORTS_ENV = "SLOS_SERVE_PUBLISH_PORTS"
DEFAULT_PORTS = "29500-29999"
_HIGHEST = 65_535


class NoFreePortError(SlosServeError):
    """Every port of the range is taken on this node."""


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports ``first`` to ``last``, both included."""

    first: int
    last: int

    @classmethod
    def of_text(cls, text: str) -> PortRange:
        """Read ``29500-29999`` or ``29500``.

        Raises:
            InvalidFieldError: not a range of ports.
        """
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text.strip())
        first = int(found[1]) if found else 0
        last = int(found[2] or first) if found else 0
        if not 0 < first <= last <= _HIGHEST:
            raise InvalidFieldError("publish_ports", text, "a range of ports such as 29500-29999")
        return cls(first, last)

    def bind(self, socket: zmq.Socket[bytes], host: str) -> int:
        """Bind to the first free port and return it.

        Raises:
            NoFreePortError: there is none.
        """
        for port in range(self.first, self.last + 1):
            try:
                socket.bind(f"tcp://{host}:{port}")
            except zmq.ZMQError as fault:
                if fault.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
            else:
                return port
        raise NoFreePortError(
            f"publish_ports: every port of {self.first}-{self.last} is taken on {host}; each replica needs one"
        )
