"""What a replica is asked for, by class, and what it could still promise: the signal that replicas are scaled on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from slos_serve.routing.headroom import fullness, headroom, headroom_prefill_tokens, promises, with_attention
from slos_serve.routing.publication import Publication
from slos_serve.routing.router import RoutingRequest

FULLNESS = "slos_serve_fullness"
HEADROOM, PREFILL_HEADROOM = "slos_serve_headroom_", "slos_serve_prefill_headroom_"
# Replicas are scaled so that their mean fullness is this: below 1 there is room for what comes while one starts.
TARGET_FULLNESS = 0.7
FORGET_S = 300.0
LEAST_ASKED = 32
# What was asked for is averaged over this time.
ASKED_OVER_S = 30.0
_WEIGHT_OF_NEW = 0.1


@dataclass(slots=True)
class _Asked:
    """A class as it is asked for lately: its newest request, with prompt and cap averaged.

    Attributes:
        recent_tokens: prompt tokens to compute that came with its requests, as of ``last_s``; they fade with
            ``ASKED_OVER_S``.
    """

    typical: RoutingRequest
    prompt_tokens: float
    max_tokens: float
    recent_tokens: float
    last_s: float

    def tokens_per_s(self, now_s: float) -> float:
        """Prompt tokens to compute a second."""
        return self.recent_tokens * math.exp(-max(now_s - self.last_s, 0.0) / ASKED_OVER_S) / ASKED_OVER_S


class Demand:
    """Of one replica. Times are on its monotonic clock."""

    def __init__(self) -> None:
        self._classes: dict[str, _Asked] = {}
        self._unpromised: set[int] = set()

    def began(self, number: int, asked: RoutingRequest, name: str, promised: bool, now_s: float) -> None:
        """A call came.

        Args:
            number: of the call, for :meth:`ended`.
            asked: what its router knew of it.
            name: of its class.
            promised: its router promised it.
            now_s: present time.
        """
        if not asked.has_slo:
            return
        if not promised:
            self._unpromised.add(number)
        known = self._classes.get(name)
        share = 1.0 if known is None else _WEIGHT_OF_NEW
        prompt, most = (0.0, 0.0) if known is None else (known.prompt_tokens, known.max_tokens)
        prompt += share * (asked.prompt_tokens - prompt)
        most += share * (asked.max_tokens - most)
        recent = 0.0 if known is None else known.tokens_per_s(now_s) * ASKED_OVER_S
        recent += asked.prompt_tokens - max(asked.cached.values(), default=0)
        self._classes[name] = _Asked(asked, prompt, most, recent, now_s)

    def ended(self, number: int) -> None:
        """A call is over."""
        self._unpromised.discard(number)

    def stats(self, publication: Publication | None, now_s: float) -> dict[str, float]:
        """Fullness, and what each class that was asked for lately could be promised.

        A replica that never published is full.
        """
        if publication is None:
            return {FULLNESS: 1.0}
        found: dict[str, float] = {}
        asked_tokens_per_s = 0.0
        for name, asked in list(self._classes.items()):
            if now_s - asked.last_s > FORGET_S:
                del self._classes[name]
                continue
            prompt = max(round(asked.prompt_tokens), 1)
            typical = replace(asked.typical, prompt_tokens=prompt, max_tokens=max(round(asked.max_tokens), 1))
            most = max(LEAST_ASKED, promises(publication))
            found[HEADROOM + name] = headroom(publication, typical, now_s, most=most)
            found[PREFILL_HEADROOM + name] = headroom_prefill_tokens(publication, typical, now_s)
            asked_tokens_per_s += asked.tokens_per_s(now_s) * with_attention(publication, prompt)
        return {FULLNESS: fullness(publication, asked_tokens_per_s, len(self._unpromised)), **found}
