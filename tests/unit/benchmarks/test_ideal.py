"""``python -m benchmarks.ideal``: who an ideal engine promises, on cases that can be worked out by hand."""

from __future__ import annotations

from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.ideal import Case, Engine, promised_share, serve

# A batch costs 20 ms, an output token 1 ms, its context nothing; room for 10,000 tokens.
ENGINE = Engine(0.02, 0.001, 0.0, 1.0, 10_000.0)


def promised(
    *prompts: tuple[float, float, float], engine: Engine = ENGINE, selective: bool = False, output_tokens: int = 1
) -> list[bool]:
    """Whether each of (arrival, seconds of work, seconds until due) is promised."""
    rows: NDArray[np.float64] = np.zeros((len(prompts), 7))
    for i, (arrival_s, work_s, due_in_s) in enumerate(prompts):
        rows[i] = arrival_s + due_in_s, work_s, 1000.0, output_tokens, 0.1, 0.0, i
    return [bool(kept) for kept in serve(engine, 1, rows, np.array([prompt[0] for prompt in prompts]), selective)]


def test_what_fits_is_promised_and_no_more() -> None:
    assert promised((0.0, 0.5, 1.0), (0.0, 0.45, 1.0)) == [True, True]
    assert promised((0.0, 0.5, 1.0), (0.0, 0.6, 1.0)) == [True, False]
    assert promised((0.0, 0.5, 1.0), (2.0, 0.6, 1.0)) == [True, True]


def test_a_cheaper_prompt_takes_the_place_of_one_that_has_not_begun() -> None:
    three = ((0.0, 0.9, 1.0), (0.0, 0.8, 1.9), (0.0, 0.3, 1.9))
    assert promised(*three) == [True, True, False]
    assert promised(*three, selective=True) == [False, True, True]
    # The first has begun by then: the second gives way.
    later = (three[0], (0.0, 0.8, 1.9), (0.05, 0.3, 1.85))
    assert promised(*later, selective=True) == [True, False, True]


def test_a_prompt_that_needs_more_kv_than_is_left_is_not_promised() -> None:
    small = ENGINE._replace(kv_tokens=1500.0)
    # The first keeps its 1,000 tokens for as long as it decodes.
    assert promised((0.0, 0.1, 1.0), (0.0, 0.1, 1.0), engine=small, output_tokens=200) == [True, False]
    assert promised((0.0, 0.1, 1.0), (0.0, 0.1, 1.0), output_tokens=200) == [True, True]


def test_decodes_take_their_share_until_they_are_ahead() -> None:
    # A decode that is due every 100 ms costs a fixed 20 ms and 1 ms of its own each time: 0.79 s of a second are left.
    assert promised((0.0, 0.1, 0.5), (0.11, 0.75, 1.0), output_tokens=10_000) == [True, True]
    assert promised((0.0, 0.1, 0.5), (0.11, 0.85, 1.0), output_tokens=10_000) == [True, False]
    # After two seconds alone it is so far ahead that nothing is due for the second.
    assert promised((0.0, 0.1, 0.5), (2.11, 0.85, 1.0), output_tokens=10_000) == [True, True]


def test_beginnings_that_came_before_are_not_computed_again() -> None:
    """Long contexts: 40 % of the prompt tokens cost nothing, so more is promised than of prompts that share nothing."""
    case = Case("long", True, 1, 120, 1, "poisson", "none", 0.7, 0.0, "llama-3.1-8b-h100")
    shared = promised_share(case, 0, 2.0, 30)
    with mock.patch("benchmarks.ideal.cached_at_best", lambda _prefixes, prompts, _size: np.zeros(len(prompts))):
        alone = promised_share(case, 0, 2.0, 30)
    assert alone + 0.1 < shared <= 1.0
