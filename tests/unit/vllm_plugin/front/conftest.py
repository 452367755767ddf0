"""What all tests of the front end share."""

from __future__ import annotations

import pytest

from slos_serve.vllm_plugin.front import open_promises


@pytest.fixture(autouse=True)
def a_busy_machine_is_no_late_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's word of these tests takes turns of the event loop, which may take long."""
    monkeypatch.setattr(open_promises, "LAST_WORD_S", 1.0)
