"""Tiers that clients already name: fields and headers of others, and the class that each value stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_MAPPED = 1000
SERVICE_TIER, PRIORITY = "service_tier", "priority"
BODY_FIELDS = (SERVICE_TIER, PRIORITY)
# Headers of llm-d and of the Gateway API's inference extension that name a tier or a tenant.
KNOWN_HEADERS = (
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
)
# How llm-d's gateway is told, and tells, that a request was refused because its promise cannot be kept now.
DROPPED_HEADER, DROPPED = "x-llm-d-request-dropped-reason", "rejected-saturated"
# Values that ask for nothing in particular: an unmapped one is no surprise.
ORDINARY = frozenset({(SERVICE_TIER, "auto"), (SERVICE_TIER, "default"), (PRIORITY, "0")})


@dataclass(frozen=True)
class TierMap:
    """The section ``map:`` of a class file.

    Attributes:
        fields: field of the body (``service_tier``, ``priority``) or header in lower case -> value -> class name.
    """

    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def headers(self) -> tuple[str, ...]:
        """Headers that are looked at: those of the file first, in its order."""
        mapped = [name for name in self.fields if name not in BODY_FIELDS]
        return (*mapped, *(name for name in KNOWN_HEADERS if name not in self.fields))

    def class_of(self, name: str, value: str) -> str | None:
        """The class that a value of a field stands for; ``None`` when it is not mapped."""
        return self.fields.get(name, {}).get(value)
