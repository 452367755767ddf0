"""What a mirror expects of a request."""

from __future__ import annotations

import pytest

from slos_serve.core.verdict import Why
from slos_serve.routing.predicted import predicted
from slos_serve.routing.router import route
from tests.builders import EngineBuilder
from tests.unit.routing.fleet import NOW_S, loaded, mirrors_of, request


def owing(prompts: int) -> EngineBuilder:
    """An engine that owes so many long prompts soon."""
    engine = loaded(0)
    for _ in range(prompts):
        engine.wait(1500, due_in_s=1.0)
    return engine


@pytest.mark.parametrize("prompts", [0, 2])
def test_a_request_that_was_sent_is_expected_as_it_was_before(prompts: int) -> None:
    mirrors, asked = mirrors_of(a=owing(prompts)), request(1000, due_in_s=5.0)
    before = predicted(mirrors, "a", NOW_S, asked)
    route(NOW_S, asked, mirrors)
    after = predicted(mirrors, "a", NOW_S, asked, entered=True)
    assert before is not None and after is not None and before.ttft_s > 0.0
    assert after.ttft_s == pytest.approx(before.ttft_s) and after.tpot_s == pytest.approx(before.tpot_s, rel=0.05)


@pytest.mark.parametrize(
    ("engine", "given", "binds"),
    [
        (loaded(0), {"tpot_s": 0.0201}, Why.DECODE_RATE),  # one decode alone takes 20.04 ms
        (owing(8), {}, Why.TTFT_TOO_LATE),
        (loaded(0, total_blocks=20), {"max_tokens": 4000}, Why.KV_FULL),
    ],
)
def test_what_binds_is_named(engine: EngineBuilder, given: dict[str, float], binds: Why) -> None:
    found = predicted(mirrors_of(a=engine), "a", NOW_S, request(1000, **given))  # type: ignore[arg-type]  # by name
    assert found is not None and found.obstacle is binds


def test_nothing_is_expected_of_a_lost_request_or_a_silent_replica() -> None:
    mirrors = mirrors_of(a=loaded(0))
    mirrors.add("b")
    assert predicted(mirrors, "a", NOW_S, request(1000, due_in_s=0.001)) is None
    assert predicted(mirrors, "b", NOW_S, request(1000)) is None and predicted(mirrors, "c", NOW_S, request()) is None
