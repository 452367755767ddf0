"""Seeds and engines that constants may be chosen on, and those that only tables use.

A constant that was chosen on the seeds of a table makes that table flatter its owner. So a run that chooses refuses
seeds of tables, and a run that fills a table refuses seeds of tuning. ``benchmarks/README.md`` says the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from slos_serve.core.errors import InvalidFieldError

FIRST_TEST_SEED = 22
TUNING_ENGINES = ("opt-13b-a100",)
# Arrival processes whose load differs so much from seed to seed that three seeds say little.
_BURSTY = ("azure-code", "gamma", "burst")
_FEW_SEEDS, _MANY_SEEDS = 3, 5


def tuning_seeds(count: int) -> list[int]:
    """The first ``count`` seeds that constants may be chosen on.

    Raises:
        InvalidFieldError: there are fewer.
    """
    return check_tuning(list(range(count)))


def table_seeds(count: int) -> list[int]:
    """The first ``count`` seeds of tables."""
    return list(range(FIRST_TEST_SEED, FIRST_TEST_SEED + count))


def check_tuning(seeds: Sequence[int]) -> list[int]:
    """The seeds of a run that chooses constants.

    Raises:
        InvalidFieldError: one of them belongs to tables.
    """
    if not seeds or min(seeds) < 0 or max(seeds) >= FIRST_TEST_SEED:
        raise InvalidFieldError("seeds", list(seeds), f"tuning seeds, 0 to {FIRST_TEST_SEED - 1}")
    return list(seeds)


def check_test(seeds: Sequence[int]) -> list[int]:
    """The seeds of a run that fills a table.

    Raises:
        InvalidFieldError: constants may have been chosen on one of them.
    """
    if not seeds or min(seeds) < FIRST_TEST_SEED:
        raise InvalidFieldError("seeds", list(seeds), f"seeds of tables, {FIRST_TEST_SEED} or more")
    return list(seeds)


def check_tuning_engine(profile: str) -> str:
    """The profile of a run that chooses constants.

    Raises:
        InvalidFieldError: the engine is kept for tables.
    """
    if profile not in TUNING_ENGINES:
        raise InvalidFieldError("profile", profile, f"an engine for tuning, one of {list(TUNING_ENGINES)}")
    return profile


def default_count(arrivals: str) -> int:
    """Seeds that a table takes by default: five where arrivals are bursty, else three."""
    return _MANY_SEEDS if arrivals.startswith(_BURSTY) else _FEW_SEEDS
