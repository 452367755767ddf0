"""When a request without a promise is likely to begin: what is queued before it, over how fast such queues go.

Requests without a promise run in what is left over. How much that is depends on the promises still to come, so it is
learnt: from one publication to the next, the prompts that left the queue. Where nothing was queued lately, the rate is
the planner's own beside the decodes that run. Shares go on evenly (:mod:`slos_serve.planning.best_effort`), so of the
others' prompts count as many tokens as the request's own share has queued. A crowd of promises is taken to go on for as
long again as there has been a queue; after it prompts are computed at the rate of an engine without promises.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable

from slos_serve.routing.mirror_arrays import rate_beside
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.publication import Publication
from slos_serve.routing.router import RoutingRequest

# Rates are those of this long, about; and so many seconds at the planner's rate are mixed in.
OVER_S, PRIOR_S = 10.0, 1.0
# No start is told later than this.
LATEST_S = 3600.0
Queued = tuple[int, float]


class StartForecast:
    """Forecasts starts on one engine."""

    def __init__(self) -> None:
        self._last: Publication | None = None
        self._queued = 0.0
        self._went_tokens = self._busy_s = 0.0
        # Since when there has been a queue; and tokens of a step that has begun and not ended at the last publication.
        self._since_s = math.inf
        self._going_tokens = 0.0

    def update(self, publication: Publication, came: Iterable[Queued]) -> None:
        """Learn from a publication.

        Args:
            publication: the engine's newest.
            came: share and prompt tokens of requests without a promise that it is the first to show.
        """
        last, before = self._last, self._queued + sum(tokens for _, tokens in came)
        self._last, self._queued = publication, float(publication.queued_tokens.sum())
        span_s = 0.0 if last is None else publication.ready_s - last.ready_s
        if before <= 0.0 or span_s <= 0.0:
            self._since_s = publication.ready_s
        went_tokens = self._going_tokens
        self._going_tokens = max(before - self._queued, 0.0)
        if publication.ready_s > publication.time_s:  # of the end of a planned step; else of the beginning of one
            went_tokens, self._going_tokens = went_tokens + self._going_tokens, 0.0
        fade = math.exp(-max(span_s, 0.0) / OVER_S)
        self._went_tokens = self._went_tokens * fade + went_tokens
        self._busy_s = self._busy_s * fade + (span_s if before > 0.0 else 0.0)

    def start_s(self, share: int, sent: Iterable[Queued], owed_tokens: float, rate: float, idle_rate: float) -> float:
        """Seconds until the first token of a request that came last, :data:`LATEST_S` at most.

        Args:
            share: of the request.
            sent: share and prompt tokens of requests without a promise that no publication has shown yet, this one too.
            owed_tokens: prompt tokens that are promised.
            rate: prompt tokens a second beside the promised decodes.
            idle_rate: prompt tokens a second without any.
        """
        queued = {share: 0.0}
        published: Iterable[Queued] = ()
        if self._last is not None:
            published = zip(self._last.queued_shares.tolist(), self._last.queued_tokens.tolist(), strict=True)
        for one, tokens in (*published, *sent):
            queued[one] = queued.get(one, 0.0) + tokens
        ahead = sum(min(tokens, queued[share]) for tokens in queued.values())
        rate = max(rate, 1e-9)
        left_over = (self._went_tokens + PRIOR_S * rate) / (self._busy_s + PRIOR_S)
        queue_s = 0.0 if self._last is None else max(self._last.ready_s - self._since_s, 0.0)
        return min(owed_tokens / rate + ahead / left_over, queue_s + (owed_tokens + ahead) / idle_rate, LATEST_S)


class Starts:
    """Forecasts starts on every replica of a router.

    Args:
        mirrors: of the replicas; publications reach them through :meth:`update`.
    """

    def __init__(self, mirrors: Mirrors) -> None:
        self._mirrors = mirrors
        self._forecasts: dict[str, StartForecast] = {}

    def update(self, publication: Publication, offset_s: float = 0.0, tickets: Container[int] | None = None) -> bool:
        """As :meth:`slos_serve.routing.mirrors.Mirrors.update`, which is called; forecasts learn from what is new."""
        name = publication.replica
        before = self._sent(name)
        if not self._mirrors.update(publication, offset_s, tickets):
            return False
        still = self._sent(name)
        came = [queued for key, queued in before.items() if key not in still]
        self._forecasts.setdefault(name, StartForecast()).update(publication, came)
        return True

    def forget(self, name: str) -> None:
        """A replica is gone. No-op when it is unknown."""
        self._forecasts.pop(name, None)

    def start_s(self, name: str, now_s: float, asked: RoutingRequest) -> float | None:
        """Seconds from its arrival to the first token of a request that was sent without a promise just now.

        Returns:
            ``None`` while its replica has not published.
        """
        forecast = self._forecasts.get(name)
        if forecast is None or name not in self._mirrors:
            return None
        k, m = self._mirrors.position(name), self._mirrors.arrays
        first, count = int(m.first[k]), int(m.num_owed[k])
        owed_tokens = float(m.cost_tokens[k, first : first + count].sum())
        rate, idle_rate = rate_beside(m, k, m.counts[k]), float(m.idle_rate[k])
        wait_s = forecast.start_s(asked.own_share, self._sent(name).values(), owed_tokens, rate, idle_rate)
        return max(float(m.ready_s[k]), now_s) - asked.arrival_s + wait_s

    def _sent(self, name: str) -> dict[int, Queued]:
        """Share and prompt tokens of requests without a promise that no publication has shown, by their row's id."""
        if name not in self._mirrors:
            return {}
        return {
            id(row): (int(row["share"][0]), float(row["prompt_tokens"][0]))
            for row in self._mirrors.sent_unpromised(name)
        }
