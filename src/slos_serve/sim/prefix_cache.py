"""KV blocks of finished calls, kept by session until their room is needed (least recently used first).

A simplification of vLLM's block-hash cache: prefixes are shared within a session only, as a tool loop or a chat does.
"""

from __future__ import annotations

from collections import OrderedDict


class PrefixCache:
    """Sessions whose last call's KV is still there.

    Attributes:
        num_blocks: blocks held; all of them evictable.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tokens: OrderedDict[int, int] = OrderedDict()
        self._expected: dict[int, int] = {}  # session -> slot of its waiting call
        self.num_blocks = 0

    def _blocks(self, tokens: int) -> int:
        return tokens // self._block_size

    def keep(self, session: int, tokens: int) -> None:
        """Remember the whole blocks of a finished call's context; replaces what the session had."""
        self._take(session)
        whole = self._blocks(tokens)
        if whole > 0:
            self._tokens[session] = whole * self._block_size
            self.num_blocks += whole

    def peek(self, session: int, prompt_tokens: int) -> int:
        """Tokens of a prompt that the cache would supply; at least one token is always left to compute."""
        usable = min(self._tokens.get(session, 0), prompt_tokens - 1)
        return self._blocks(usable) * self._block_size

    @property
    def num_expected(self) -> int:
        """Waiting calls that count on a prefix."""
        return len(self._expected)

    def expect(self, session: int, slot: int) -> None:
        """The call in ``slot`` counts on its session's prefix."""
        self._expected[session] = slot

    def give_up(self, session: int) -> None:
        """The session's waiting call will not start."""
        self._expected.pop(session, None)

    def start(self, session: int) -> bool:
        """The session's waiting call starts; whether it took the prefix that it counted on."""
        if self._expected.pop(session, None) is None:
            return False
        self._take(session)
        return True

    def _take(self, session: int) -> None:
        """Blocks of a session go to the call that starts on them, or to nobody."""
        tokens = self._tokens.pop(session, 0)
        self.num_blocks -= self._blocks(tokens)

    def evict(self, room_blocks: int) -> list[int]:
        """Drop least recently used sessions until at most ``room_blocks`` are held.

        Returns:
            Slots of the waiting calls that counted on what was dropped.
        """
        dropped: list[int] = []
        while self.num_blocks > max(room_blocks, 0):
            session, tokens = self._tokens.popitem(last=False)
            self.num_blocks -= self._blocks(tokens)
            if session in self._expected:
                dropped.append(self._expected.pop(session))
        return dropped
