"""The message that brings a publication from a replica to its routers.

Four parts: when it was sent, whether the state is unchanged since the publication was made, the publication as JSON,
and what the replica's process adds to it, as JSON too. Nothing that comes over the network is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import check_number
from slos_serve.routing.headroom import Room
from slos_serve.routing.publication import Publication
from slos_serve.vllm_plugin.publish import STEPS_KEY, TICKETS_KEY

ADDRESS_KEY = "slos_serve_publications"
# A router subscribes to this and its name too, which is how a replica knows who hears it. No message begins so.
ROUTER_TOPIC = b"router/"
_FRESH, _UNCHANGED = b"0", b"1"
MOST_ROUTERS, MOST_NAME_CHARS = 4096, 64


@dataclass(frozen=True, slots=True)
class Notes:
    """What a replica's process adds to its engine's publication.

    Attributes:
        routers: names of the routers that hear the replica now, sorted.
        room: what it could still promise; ``None`` before its first publication.
    """

    routers: tuple[str, ...] = ()
    room: Room | None = None

    @classmethod
    def of_json(cls, text: bytes) -> Notes:
        """Read them.

        Raises:
            InvalidFieldError: they cannot be used.
        """
        try:
            found = cls(**json.loads(text))
            room = None if found.room is None else Room(**found.room)  # type: ignore[arg-type]
        except (ValueError, TypeError, RecursionError) as fault:
            raise InvalidFieldError("publication notes", str(fault)[:200], "JSON of known fields") from fault
        names = found.routers
        if not isinstance(names, list | tuple) or len(names) > MOST_ROUTERS:
            raise InvalidFieldError("routers", type(names).__name__, f"a list of at most {MOST_ROUTERS} names")
        if not all(isinstance(name, str) and len(name) <= MOST_NAME_CHARS for name in names):
            raise InvalidFieldError("routers", "other values", f"names of at most {MOST_NAME_CHARS} characters")
        for field, value in {} if room is None else asdict(room).items():
            check_number(field, value, low=0.0, high=1e9, low_included=True)
        return cls(tuple(names), room)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A publication on its way.

    Attributes:
        sent_s: when, on the replica's monotonic clock.
        unchanged: the replica rests, and nothing has happened since the publication was made.
        payload: the publication, still as JSON.
        received_s: when, on the receiver's monotonic clock.
        notes: of the replica's process.
    """

    sent_s: float
    unchanged: bool
    payload: bytes
    received_s: float = 0.0
    notes: Notes = Notes()

    def parts(self) -> list[bytes]:
        """As a multipart message."""
        notes = json.dumps(asdict(self.notes)).encode()
        return [repr(self.sent_s).encode("ascii"), _UNCHANGED if self.unchanged else _FRESH, self.payload, notes]

    @classmethod
    def of_parts(cls, parts: Sequence[bytes], received_s: float) -> Envelope:
        """The inverse of :meth:`parts`.

        Raises:
            InvalidFieldError: it is no such message.
        """
        try:
            sent, flag, payload, notes = parts
            sent_s = float(sent)
        except ValueError as fault:
            raise InvalidFieldError("publication message", len(parts), "four parts, the first a number") from fault
        if not math.isfinite(sent_s):
            raise InvalidFieldError("publication message", sent_s, "four parts, the first a finite number")
        return cls(sent_s, flag == _UNCHANGED, payload, received_s, Notes.of_json(notes))

    def publication(self, replica: str) -> Publication:
        """The publication, named after the replica that it is known to come from.

        Raises:
            InvalidFieldError: it cannot be used.
        """
        return replace(Publication.of_dict(self._document()), replica=replica)

    def steps_done(self) -> int | None:
        """Steps that the engine has finished, ``None`` where the publication does not say it.

        Raises:
            InvalidFieldError: it cannot be used.
        """
        found = self._document().get(STEPS_KEY)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int):
            raise InvalidFieldError(STEPS_KEY, found, "a whole number")
        return found

    def tickets(self) -> frozenset[int] | None:
        """Tickets of requests that came to the engine lately, ``None`` where the publication does not say it.

        Raises:
            InvalidFieldError: they cannot be used.
        """
        found = self._document().get(TICKETS_KEY)
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(number, int) for number in found):
            raise InvalidFieldError(TICKETS_KEY, found, "a list of whole numbers")
        return frozenset(found)

    def _document(self) -> dict[str, Any]:
        try:
            given = json.loads(self.payload)
        except (ValueError, RecursionError) as fault:
            raise InvalidFieldError("publication", str(fault), "JSON") from fault
        if not isinstance(given, dict):
            raise InvalidFieldError("publication", type(given).__name__, "a JSON object")
        return given
