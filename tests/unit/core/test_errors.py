"""The errors that cross a boundary."""

from __future__ import annotations

import pickle

import pytest

from slos_serve.core.errors import InvalidFieldError


@pytest.mark.parametrize("where", [None, "classes.yaml:3"])
def test_an_invalid_field_survives_the_way_from_another_process(where: str | None) -> None:
    error = InvalidFieldError("tpot_ms", -1, "a number above 0", where)
    arrived = pickle.loads(pickle.dumps(error))
    assert str(arrived) == str(error)
    assert (arrived.field, arrived.given, arrived.allowed, arrived.where) == ("tpot_ms", -1, "a number above 0", where)
