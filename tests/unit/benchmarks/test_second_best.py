"""The benchmark of weaker promises, on a few requests."""

from __future__ import annotations

import pytest

from benchmarks.second_best import WEAKER, main, shares
from slos_serve.core.errors import InvalidFieldError


def test_more_get_some_promise_and_shares_are_of_all_requests() -> None:
    without = shares("opt-13b-a100", "chat", [22], 120, ())
    with_weaker = shares("opt-13b-a100", "chat", [22], 120, WEAKER)
    assert without[0] == without[2] < with_weaker[2] <= 1.0
    assert all(first_kept <= first_made <= some for first_made, first_kept, some, _ in (without, with_weaker))


def test_seeds_of_tuning_are_refused() -> None:
    with pytest.raises(InvalidFieldError, match="seed"):
        main(["--seeds", "2"])
