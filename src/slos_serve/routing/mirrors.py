"""A router's picture of its replicas: one mirror each, set by publications and corrected for what it sends.

A request that is sent enters the mirror at once, so a burst cannot slip through between two publications; when a
publication comes that has not seen the request yet, it is entered again. Times are on the router's clock; publications
made on another clock are shifted when they are received.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.request import NUM_SHARES, RequestArray
from slos_serve.perf.formula import NUM_COEFFICIENTS
from slos_serve.planning.demand import SIZES
from slos_serve.planning.supply import MOMENT_TOKENS
from slos_serve.routing.mirror_arrays import TIERS, MirrorArrays, rate_beside
from slos_serve.routing.mirror_kernel import BoolArray, enter
from slos_serve.routing.publication import Publication

PLACES = 64
# A request whose engine has not named it for this long is lost; its room is given back.
LOST_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that was sent to a replica and that no publication has shown yet.

    Attributes:
        sent_s: when.
        row: :data:`slos_serve.core.request.REQUEST_DTYPE` [1].
        cached_tokens: prompt tokens its replica has cached.
        promised: whether it was sent because it attains there.
        ticket: number that the engine names once it has the request; 0 without one.
    """

    sent_s: float
    row: RequestArray
    cached_tokens: int
    promised: bool
    ticket: int = 0


@dataclass(slots=True)
class _Replica:
    """What is known of a replica beside its arrays."""

    name: str
    sequence: int = -1
    in_flight: list[Sent] = field(default_factory=list)
    last: Publication | None = None
    offset_s: float = 0.0


class Mirrors:
    """The mirrors of every replica that a router may send to.

    Args:
        replicas: names of those there are from the start.
        num_classes: SLO classes that requests may belong to.
        transit_s: a request may take this long to reach its replica; a publication made sooner may lack it.
    """

    def __init__(self, replicas: Iterable[str] = (), num_classes: int = 1, transit_s: float = 0.0) -> None:
        self._num_classes = max(num_classes, 1)
        self._transit_s = transit_s
        self._index: dict[str, int] = {}
        self._replicas: list[_Replica | None] = []
        self.arrays = _arrays(4, PLACES, 1, self._num_classes)
        self.present: BoolArray = np.zeros(4, dtype=np.bool_)
        self._fresh_s = np.full(4, -np.inf)
        for name in replicas:
            self.add(name)

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def add(self, name: str) -> None:
        """A replica that may be sent to; it counts as full until its first publication. No-op when it is known."""
        if name in self._index:
            return
        if None in self._replicas:
            k = self._replicas.index(None)
            self._replicas[k] = _Replica(name)
        else:
            k = len(self._replicas)
            self._replicas.append(_Replica(name))
            if k == len(self.present):
                self._resize(replicas=2 * k)
        self._index[name] = k
        self.present[k] = True
        self._clear(k)

    def remove(self, name: str) -> None:
        """A replica that is gone; what was in flight there is the caller's to route again. No-op when unknown."""
        k = self._index.pop(name, None)
        if k is not None:
            self._replicas[k] = None
            self.present[k] = False

    def name_of(self, k: int) -> str:
        """Name of the replica at position ``k`` of the arrays."""
        return self._at(k).name

    def position(self, name: str) -> int:
        """Position of a replica in the arrays, -1 when unknown."""
        return self._index.get(name, -1)

    def planned_step_s(self, k: int) -> float:
        """Seconds of the step that the replica at position ``k`` published last; 0 when it was idle."""
        last = self._at(k).last
        return last.ready_s - last.time_s if last is not None else 0.0

    def has_published(self, name: str) -> bool:
        """Whether a replica has said anything in its present life."""
        k = self._index.get(name)
        return k is not None and self._at(k).sequence >= 0

    def in_flight(self, name: str) -> int:
        """How many requests were sent there that no publication has shown yet."""
        return len(self._at(self._index[name]).in_flight)

    def sent_unpromised(self, name: str) -> list[RequestArray]:
        """Rows of requests that were sent there without a promise and that no publication has shown yet."""
        return [sent.row for sent in self._at(self._index[name]).in_flight if not sent.promised]

    def usable(self, now_s: float, stale_after_s: float) -> BoolArray:
        """bool [R]: replicas whose last publication still tells enough.

        A replica in the middle of a long step cannot publish, so the bound counts from the step's predicted end.
        """
        return np.asarray(self.present & (now_s <= self._fresh_s + stale_after_s))

    def update(self, publication: Publication, offset_s: float = 0.0, tickets: Container[int] | None = None) -> bool:
        """Take over a publication; False when it is not newer than what is known, or from an unknown replica.

        Args:
            publication: from one of the replicas.
            offset_s: the router's clock minus the replica's.
            tickets: of requests that came to the engine lately; ``None`` where it does not say. A request with a ticket
                stays in flight until it is among them, however long its hand-over takes.

        Raises:
            InvalidFieldError: its fields do not belong together.
        """
        k = self._index.get(publication.replica)
        if k is None:
            return False
        replica = self._at(k)
        if publication.sequence <= replica.sequence:
            return False
        publication.check()
        replica.sequence = publication.sequence
        replica.last, replica.offset_s = publication, offset_s
        self._load(k, publication, offset_s)
        self._fresh_s[k] = max(publication.time_s, publication.ready_s) + offset_s
        seen_s = publication.seen_until_s + offset_s

        def is_on_its_way(sent: Sent) -> bool:
            if tickets is not None and sent.ticket:
                return sent.ticket not in tickets and sent.sent_s > seen_s - LOST_AFTER_S
            return sent.sent_s > seen_s - self._transit_s

        replica.in_flight = [sent for sent in replica.in_flight if is_on_its_way(sent)]
        for sent in replica.in_flight:
            self._enter(k, sent)
        return True

    def restarted(self, name: str) -> None:
        """A replica began a new life: its next publication counts whatever its sequence number."""
        k = self._index[name]
        self._replicas[k] = _Replica(name)
        self._clear(k)

    def renew(self, name: str, now_s: float) -> None:
        """A replica said that nothing changed since its last publication."""
        k = self._index[name]
        if self._at(k).sequence >= 0:
            self._fresh_s[k] = max(self._fresh_s[k], now_s)

    def send(self, k: int, sent: Sent) -> None:
        """Count a request as sent to the replica at position ``k``."""
        self._at(k).in_flight.append(sent)
        self._enter(k, sent)

    def sent_with(self, name: str, ticket: int) -> list[Sent]:
        """The requests of a ticket that were sent to a replica and that no publication has shown yet."""
        return [sent for sent in self._at(self._index[name]).in_flight if sent.ticket == ticket]

    def newest(self, name: str) -> Sent:
        """The request that was sent to a replica last and that no publication has shown yet."""
        return self._at(self._index[name]).in_flight[-1]

    def withdraw(self, name: str, sent: Sent) -> None:
        """Give back the room of a request that did not get to its replica. No-op when it is no longer in flight."""
        k = self._index.get(name)
        if k is None:
            return
        replica = self._at(k)
        left = [other for other in replica.in_flight if other is not sent]
        if len(left) == len(replica.in_flight):
            return
        replica.in_flight = left
        if replica.last is None:
            if not sent.promised:
                self.arrays.num_unpromised[k] -= 1
            return
        fresh_s = self._fresh_s[k]
        self._load(k, replica.last, replica.offset_s)
        self._fresh_s[k] = fresh_s
        for other in left:
            self._enter(k, other)

    def _at(self, k: int) -> _Replica:
        replica = self._replicas[k]
        assert replica is not None
        return replica

    def _enter(self, k: int, sent: Sent) -> None:
        m = self.arrays
        if not sent.promised:
            m.num_unpromised[k] += 1
            return
        if self._at(k).sequence < 0:
            return
        if m.first[k] + m.num_owed[k] == m.due_s.shape[1]:
            self._make_place(k)
        enter(self.arrays, k, sent.row, sent.cached_tokens)

    def _make_place(self, k: int) -> None:
        """Move the owed prompts to the front of their row; when they fill it, make all rows longer."""
        m = self.arrays
        first, count = int(m.first[k]), int(m.num_owed[k])
        if first > 0:
            for owed in (m.due_s, m.cost_tokens, m.tier, m.weight, m.needs_seat, m.begun, m.memory):
                owed[k, :count] = owed[k, first : first + count].copy()
            m.first[k] = 0
        else:
            self._resize(places=2 * m.due_s.shape[1])

    def _load(self, k: int, given: Publication, offset_s: float) -> None:
        owed, tiers, checkpoints = len(given.due_s), len(given.pace_s), len(given.memory_left)
        if tiers > TIERS:
            raise InvalidFieldError("pace_s", tiers, f"at most {TIERS} tiers")
        if owed > self.arrays.due_s.shape[1]:
            self._resize(places=2 * owed)
        if checkpoints > self.arrays.memory_left.shape[1]:
            self._resize(checkpoints=checkpoints)
        m = self.arrays
        self._clear(k)
        m.clock_s[k] = m.ready_s[k] = given.ready_s + offset_s
        m.num_owed[k], m.num_tiers[k] = owed, tiers
        m.due_s[k, :owed] = given.due_s + offset_s
        for name in ("cost_tokens", "tier", "weight", "needs_seat", "begun"):
            getattr(m, name)[k, :owed] = getattr(given, name)
        if owed:
            m.memory[k, :owed, :] = given.memory.max(axis=1)[:, None]
            m.memory[k, :owed, :checkpoints] = given.memory
        for name in ("pace_s", "periods_s", "tokens_each", "extra_s_each", "counts", "in_tier"):
            getattr(m, name)[k, :tiers] = getattr(given, name)
        m.memory_left[k, :] = given.memory_left.min()
        m.memory_left[k, :checkpoints] = given.memory_left
        for name in ("coefficients", "draft_s", "max_step_tokens"):
            getattr(m, name)[k] = getattr(given, name)
        for name in ("margin", "max_implied_ttft_s"):
            getattr(m, name)[k] = getattr(given, name)
        m.moments_s[k], m.lent_tokens[k], m.seats[k] = given.moments_s + offset_s, given.lent_tokens, given.seats
        m.to_come[k] = given.to_come.reshape(2, SIZES)
        m.total_blocks[k], m.block_size[k] = given.total_blocks, given.block_size
        classes = min(len(given.forecast_tokens), self._num_classes)
        m.forecast_tokens[k, :classes, 0] = given.forecast_tokens[:classes]
        rank, class_index = np.divmod(given.boosted, len(given.forecast_tokens))
        here = class_index < self._num_classes  # a replica that knows other classes numbers shares in its own way
        places = class_index[here] + self._num_classes * rank[here]
        m.boost[k, places[places < NUM_SHARES]] = given.boost[here][places < NUM_SHARES]
        m.num_unpromised[k] = given.num_unpromised
        m.idle_rate[k] = max(rate_beside(m, k, np.zeros(TIERS)), 1e-9)

    def _clear(self, k: int) -> None:
        """A mirror of nothing."""
        m = self.arrays
        self._fresh_s[k] = -np.inf
        for part in m:
            part[k] = 0
        m.clock_s[k] = m.ready_s[k] = -np.inf
        m.pace_s[k] = m.periods_s[k] = np.inf
        m.tokens_each[k] = m.idle_rate[k] = 1.0
        m.block_size[k] = 1
        m.forecast_tokens[k] = np.inf
        m.boost[k] = 1.0

    def _resize(self, replicas: int = 0, places: int = 0, checkpoints: int = 0) -> None:
        """Arrays with at least this much room and the old contents."""
        old = self.arrays
        self.arrays = _arrays(
            max(replicas, len(old.num_owed)),
            max(places, old.due_s.shape[1]),
            max(checkpoints, old.memory_left.shape[1]),
            self._num_classes,
        )
        for before, after in zip(old, self.arrays, strict=True):
            after[tuple(slice(0, size) for size in before.shape)] = before
        grown = old.memory_left.shape
        # More checkpoints than a mirror knew: the tightest it knew holds for them too.
        self.arrays.memory_left[: grown[0], grown[1] :] = old.memory_left.min(axis=1)[:, None]
        self.arrays.memory[: grown[0], : old.memory.shape[1], grown[1] :] = old.memory.max(axis=2)[:, :, None]
        more = len(self.arrays.num_owed) - len(self.present)
        self.present = np.append(self.present, np.zeros(more, dtype=np.bool_))
        self._fresh_s = np.append(self._fresh_s, np.full(more, -np.inf))


def _arrays(replicas: int, places: int, checkpoints: int, classes: int) -> MirrorArrays:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(MirrorArrays._fields, (replicas,))
    shapes |= dict.fromkeys(("due_s", "cost_tokens", "tier", "weight", "needs_seat", "begun"), (replicas, places))
    shapes["memory"] = (replicas, places, checkpoints)
    by_tier = ("pace_s", "periods_s", "tokens_each", "extra_s_each", "counts", "in_tier")
    shapes |= dict.fromkeys(by_tier, (replicas, TIERS))
    shapes |= dict.fromkeys(("moments_s", "lent_tokens", "seats"), (replicas, len(MOMENT_TOKENS)))
    shapes["memory_left"] = (replicas, checkpoints)
    shapes["to_come"] = (replicas, 2, SIZES)
    shapes["coefficients"] = (replicas, NUM_COEFFICIENTS)
    shapes["forecast_tokens"], shapes["boost"] = (replicas, classes, 1), (replicas, NUM_SHARES)
    whole = {"first", "num_owed", "tier", "begun", "num_tiers", "total_blocks", "block_size", "num_unpromised"}
    made: dict[str, Any] = {
        name: np.zeros(shape, dtype=np.int64 if name in whole else np.float64) for name, shape in shapes.items()
    }
    return MirrorArrays(**made)
