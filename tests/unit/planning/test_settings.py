"""Settings: their ranges, and that their page is the one that the code writes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from scripts.render_settings import rendered
from slos_serve.core.errors import InvalidFieldError
from slos_serve.planning.settings import RANGES, PlannerSettings

PAGE = Path(__file__).resolve().parents[3] / "docs" / "settings.md"


def test_the_page_is_the_one_that_the_code_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == rendered(), "run python scripts/render_settings.py"


def test_every_setting_has_a_range() -> None:
    assert set(RANGES) == {entry.name for entry in fields(PlannerSettings)}


@pytest.mark.parametrize("name", sorted(RANGES))
def test_values_beyond_the_range_are_refused(name: str) -> None:
    low, high, _ = RANGES[name]
    for value in (low - 1.0, high + 1.0, float("nan")):
        with pytest.raises(InvalidFieldError, match=name):
            PlannerSettings(**{name: value})  # type: ignore[arg-type]  # every setting, by name
