"""Seeds and engines of tuning and of tables."""

from __future__ import annotations

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.sim.seeds import (
    check_test,
    check_tuning,
    check_tuning_engine,
    default_count,
    table_seeds,
    tuning_seeds,
)


def test_tuning_and_tables_share_no_seed() -> None:
    assert not set(tuning_seeds(22)) & set(table_seeds(100))
    assert check_tuning([0, 21]) == [0, 21] and check_test([22, 90]) == [22, 90]


def test_the_wrong_seeds_and_engines_are_refused() -> None:
    for seeds in ([22], [3, 40], []):
        with pytest.raises(InvalidFieldError, match="0 to 21"):
            check_tuning(seeds)
    for seeds in ([21], [22, 0], []):
        with pytest.raises(InvalidFieldError, match="22 or more"):
            check_test(seeds)
    with pytest.raises(InvalidFieldError, match="0 to 21"):
        tuning_seeds(23)
    with pytest.raises(InvalidFieldError, match="opt-13b-a100"):
        check_tuning_engine("llama-2-7b-h100")


def test_bursty_arrivals_take_more_seeds() -> None:
    assert [default_count(name) for name in ("poisson", "azure-conv", "azure-code", "gamma:3")] == [3, 3, 5, 5]
