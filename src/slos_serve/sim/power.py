"""Power of a server's devices, for energy over a day.

While steps run a device is counted at its power limit, the maximum of its maker's data sheet: an upper bound, since
decodes alone draw less. What an idle device draws is an assumption, :data:`IDLE_SHARE` of that. The host is not
counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from slos_serve.core.slo import check_number
from slos_serve.files.profile_file import Profile

# Watts, by the maker's name of the product; PCIe cards have limits of their own.
LIMIT_W = {"A10": 150.0, "A100": 400.0, "B200": 1000.0, "H100": 700.0, "H200": 700.0, "L4": 72.0, "L40S": 350.0}
PCIE_LIMIT_W = {"A100": 300.0, "H100": 350.0}
IDLE_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Power:
    """Watts of one server.

    Attributes:
        busy: while steps run.
        idle: while none does.
    """

    busy: float
    idle: float


def power_of(profile: Profile, watts: float | None = None, idle_watts: float | None = None) -> Power | None:
    """Power of a server of a profile; ``None`` where its device is not known.

    Args:
        profile: names the device, and how many a server has.
        watts, idle_watts: of one device, instead of the table's.

    Raises:
        InvalidFieldError: watts below 0 or beyond any device's.
    """
    for name, given in (("--watts", watts), ("--idle-watts", idle_watts)):
        if given is not None:
            check_number(name, given, low=0.0, high=1e6, low_included=True)
    limit_w = _limit_w(profile.device) if watts is None else watts
    if limit_w is None:
        return None
    idle_w = IDLE_SHARE * limit_w if idle_watts is None else idle_watts
    return Power(profile.tensor_parallel * limit_w, profile.tensor_parallel * idle_w)


def _limit_w(device: str) -> float | None:
    words = re.findall(r"[A-Z0-9]+", device.upper())
    limits = {**LIMIT_W, **PCIE_LIMIT_W} if "PCIE" in words else LIMIT_W
    return next((limits[word] for word in words if word in limits), None)
