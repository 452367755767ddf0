"""How far a router's clock is ahead of a replica's, from messages that carry when they were sent.

Receiving less sending is the offset plus the message's delay, so the smallest of recent messages is nearest to the
offset. Only the last seconds count: clocks are slewed by up to 500 ppm (NTP), and the oldest message that counts is
wrong by what has drifted since. Five seconds keep that below 2.5 ms.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW_S = 5.0


class ClockOffset:
    """The offset to one replica's clock."""

    def __init__(self) -> None:
        # (received, difference), received ascending and differences too: the first is the smallest of the window.
        self._recent: deque[tuple[float, float]] = deque()
        self._received_s = -math.inf

    def observe(self, sent_s: float, received_s: float) -> float:
        """Take in a message and return the offset: add it to the replica's times to have the router's."""
        difference_s = received_s - sent_s
        self._received_s = max(received_s, self._received_s)
        while self._recent and self._recent[-1][1] >= difference_s:
            self._recent.pop()
        self._recent.append((self._received_s, difference_s))
        while self._recent[0][0] < self._received_s - WINDOW_S:
            self._recent.popleft()
        return self._recent[0][1]
