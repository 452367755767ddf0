"""Choices of routing that others read without loading its kernels."""

from __future__ import annotations

from enum import StrEnum

PUBLISH_EVERY_S = 0.1
STALE_AFTER_S = 1.0


class Order(StrEnum):
    """Whom to ask first."""

    PACK = "pack"
    SPREAD = "spread"
    PREFIX = "prefix"
