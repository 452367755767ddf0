"""Where each session's KV prefix is: its last round's replica and how much of the context is there.

A round's prompt contains the round before it, prompt and answer, so what that round left behind is what the next one
need not compute. Sessions that have not been heard of for longest are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

MAX_SESSIONS = 100_000


@dataclass(frozen=True, slots=True)
class Home:
    """Where a session was last.

    Attributes:
        replica: name.
        context_tokens: tokens whose KV it left there, as far as is known.
    """

    replica: str
    context_tokens: int


class Sessions:
    """Homes by session, at most ``most`` of them."""

    def __init__(self, block_size: int = 16, most: int = MAX_SESSIONS) -> None:
        self._block_size = block_size
        self._most = most
        self._homes: OrderedDict[Hashable, Home] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def sent(self, session: Hashable, replica: str, context_tokens: int) -> None:
        """A round with this context went to a replica; call again with the answer counted in when it ended."""
        self._homes[session] = Home(replica, context_tokens)
        self._homes.move_to_end(session)
        if len(self._homes) > self._most:
            self._homes.popitem(last=False)

    def cached(self, session: Hashable, prompt_tokens: int) -> dict[str, int]:
        """Replica -> prompt tokens that its prefix cache would supply: whole blocks, at least one token left out."""
        home = self._homes.get(session)
        if home is None:
            return {}
        usable = min(home.context_tokens, prompt_tokens - 1) // self._block_size * self._block_size
        return {home.replica: usable} if usable > 0 else {}

    def forget_replica(self, replica: str) -> None:
        """A replica is gone, and its KV with it."""
        self._homes = OrderedDict((key, home) for key, home in self._homes.items() if home.replica != replica)
