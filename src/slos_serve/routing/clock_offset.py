"""How far a router's clock is ahead of a replica's, from messages that carry when they were sent.

The smallest difference between receiving and sending is the offset and the shortest delay seen. Clocks drift against
each other, so the smallest is let go slowly.
"""

from __future__ import annotations

import math

DRIFT = 50e-6  # seconds a second, more than crystals differ by


class ClockOffset:
    """The offset to one replica's clock."""

    def __init__(self) -> None:
        self._offset_s = math.inf
        self._received_s = -math.inf

    def observe(self, sent_s: float, received_s: float) -> float:
        """Take in a message and return the offset: add it to the replica's times to have the router's."""
        if received_s > self._received_s > -math.inf:
            self._offset_s += DRIFT * (received_s - self._received_s)
        self._received_s = max(received_s, self._received_s)
        self._offset_s = min(self._offset_s, received_s - sent_s)
        return self._offset_s
