"""Ports that tests publish on."""

from __future__ import annotations

from slos_serve.ray_serve.ports import PortRange

PORTS = PortRange(31_000, 31_999)
