"""The message that brings a publication from a replica to its routers.

Three parts: when it was sent, whether the state is unchanged since the publication was made, the publication as JSON.
JSON only: nothing that comes over the network is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slos_serve.core.errors import InvalidFieldError
from slos_serve.routing.publication import Publication
from slos_serve.vllm_plugin.publish import STEPS_KEY, TICKETS_KEY

ADDRESS_KEY = "slos_serve_publications"
_FRESH, _UNCHANGED = b"0", b"1"


@dataclass(frozen=True, slots=True)
class Envelope:
    """A publication on its way.

    Attributes:
        sent_s: when, on the replica's monotonic clock.
        unchanged: the replica rests, and nothing has happened since the publication was made.
        payload: the publication, still as JSON.
        received_s: when, on the receiver's monotonic clock.
    """

    sent_s: float
    unchanged: bool
    payload: bytes
    received_s: float = 0.0

    def parts(self) -> list[bytes]:
        """As a multipart message."""
        return [repr(self.sent_s).encode("ascii"), _UNCHANGED if self.unchanged else _FRESH, self.payload]

    @classmethod
    def of_parts(cls, parts: Sequence[bytes], received_s: float) -> Envelope:
        """The inverse of :meth:`parts`.

        Raises:
            InvalidFieldError: it is no such message.
        """
        try:
            sent, flag, payload = parts
            sent_s = float(sent)
        except ValueError as fault:
            raise InvalidFieldError("publication message", len(parts), "three parts, the first a number") from fault
        if not math.isfinite(sent_s):
            raise InvalidFieldError("publication message", sent_s, "three parts, the first a finite number")
        return cls(sent_s, flag == _UNCHANGED, payload, received_s)

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
