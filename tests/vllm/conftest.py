"""Fixtures of the tests that run the plug-in on vLLM's own scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vllm.dry_load import Start


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start an engine, ours unless told otherwise."""
    from tests.vllm.dry_load import starting  # noqa: PLC0415 - imports vLLM, which not every machine has

    yield from starting(tmp_path, monkeypatch)
