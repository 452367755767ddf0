"""When requests without a promise are told that their answer begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.publication import Publication
from slos_serve.routing.router import unpromised
from slos_serve.routing.starts import LATEST_S, StartForecast, Starts
from slos_serve.vllm_plugin.front.explain import explain
from slos_serve.vllm_plugin.slo_args import SloArgs
from tests.unit.routing.fleet import NOW_S, loaded, published, request
from tests.unit.vllm_plugin.front.builders import Server, desk

RATE = 1000.0


def publication(ready_s: float, queued: dict[int, float], *, planned: bool = True) -> Publication:
    """What an engine says that has these tokens queued, by share."""
    return replace(
        published(loaded(0)),
        time_s=NOW_S + ready_s - (0.1 if planned else 0.0),
        ready_s=NOW_S + ready_s,
        queued_shares=np.array(list(queued), dtype=np.int64),
        queued_tokens=np.array(list(queued.values()), dtype=np.float64),
    )


def start_s(starts: StartForecast, tokens: float, share: int = 0, owed_tokens: float = 0.0) -> float:
    """Of a request that was sent just now."""
    return starts.start_s(share, [(share, tokens)], owed_tokens, RATE, RATE)


def test_on_an_idle_engine_a_prompt_takes_its_own_time_and_promised_ones_come_first() -> None:
    starts = StartForecast()
    starts.update(publication(0.0, {}), [])
    assert start_s(starts, 500) == pytest.approx(0.5)
    assert start_s(starts, 500, owed_tokens=2000) == pytest.approx(2.5)


def test_what_is_queued_before_it_comes_first_and_of_other_shares_as_much_as_of_its_own() -> None:
    starts = StartForecast()
    starts.update(publication(0.0, {0: 3000.0, 7: 9000.0}), [])
    assert start_s(starts, 1000) == pytest.approx(4.0 + 4.0)
    assert start_s(starts, 1000, share=3) == pytest.approx(1.0 + 1.0 + 1.0)


def test_the_rate_is_learnt_from_the_prompts_that_left_the_queue() -> None:
    starts = StartForecast()
    starts.update(publication(0.0, {0: 12_000.0}), [])
    for second in range(1, 60):  # 200 tokens a second leave, 100 come
        starts.update(publication(float(second), {0: 12_000.0 - 100.0 * second}), [(0, 100.0)])
    left = 12_000.0 - 5900.0
    assert left / 280.0 < start_s(starts, 0.0) < left / 200.0


@pytest.mark.parametrize("planned", [True, False])
def test_a_step_counts_with_its_time_whether_its_end_or_its_beginning_is_published(planned: bool) -> None:
    starts = StartForecast()
    starts.update(publication(0.0, {}, planned=planned), [])
    left = 20_000.0 if planned else 18_000.0  # of a step that begins its tokens are gone already
    starts.update(publication(0.001, {0: left}, planned=planned), [(0, 20_000.0)])
    for second in (2, 4, 6):
        left -= 2000.0
        starts.update(publication(float(second), {0: left}, planned=planned), [])
    assert start_s(starts, 0.0) == pytest.approx(left / 1000.0, rel=0.05)


def test_starvation_is_taken_to_last_as_long_again_as_it_has() -> None:
    starts = StartForecast()
    for second in range(11):
        starts.update(publication(float(second), {0: 5000.0}), [(0, 5000.0)] if second == 0 else [])
    assert start_s(starts, 1000) == pytest.approx(10.0 + 6.0, abs=1.1)


def test_no_start_is_told_that_lies_too_far_ahead() -> None:
    starts = StartForecast()
    assert starts.start_s(0, [(0, 1e9)], 0.0, 0.0, RATE) == LATEST_S


@pytest.mark.parametrize("slo_class", ["chat", "batch", None])
async def test_whoever_is_promised_nothing_is_told_and_nobody_else(tmp_path: Path, slo_class: str | None) -> None:
    engine = loaded(0)
    for _ in range(8):
        engine.wait(1500, due_in_s=1.0)
    front = desk(tmp_path, engine)
    expected = explain(front, SloArgs(slo_class=slo_class), 3000, 100).predicted_start_ms
    _, headers, _ = await Server(front).ask(slo_class, prompt_tokens=3000)
    assert expected is not None and int(headers["x-slo-predicted-start-ms"]) == pytest.approx(expected, abs=1.0)
    assert 500.0 < expected < 10_000.0
    _, headers, _ = await Server(desk(tmp_path, loaded(0))).ask("chat")
    assert headers["x-slo-verdict"] == "admitted" and "x-slo-predicted-start-ms" not in headers


def test_what_was_sent_counts_until_a_publication_shows_it_and_the_rate_is_learnt_from_that() -> None:
    """Two prompts of 5,000 tokens are sent; 2 s later 9,000 tokens of them are queued: the rate was 500 a second."""
    mirrors = Mirrors(["a"])
    starts, asked = Starts(mirrors), request(5000)
    assert starts.start_s("a", NOW_S, asked) is None, "it has not published"
    assert starts.update(publication(0.0, {}))
    mirrors.send(mirrors.position("a"), unpromised(NOW_S, asked))
    alone_s = starts.start_s("a", NOW_S, asked)
    assert alone_s is not None and 0.5 < alone_s < 5.0
    mirrors.send(mirrors.position("a"), unpromised(NOW_S, asked))
    assert starts.start_s("a", NOW_S, asked) == pytest.approx(2.0 * alone_s, rel=0.05)
    shown = replace(publication(2.0, {0: 9000.0}), sequence=1, seen_until_s=NOW_S + 2.0)
    assert starts.update(shown) and not starts.update(shown), "an old one teaches nothing"
    assert mirrors.in_flight("a") == 0
    later_s = starts.start_s("a", NOW_S + 2.0, replace(asked, arrival_s=NOW_S + 2.0))
    idle_s = 9000.0 / float(mirrors.arrays.idle_rate[0])
    assert later_s is not None and later_s > idle_s + 1.0
    starts.forget("a")
    assert starts.start_s("a", NOW_S + 2.0, asked) is None
