"""Workloads: the same seed gives the same bytes, lengths and rates are what was asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.bench.prompts import chat_question, coding_task, document_to_summarise, plain_text, text_to_edit
from slos_serve.bench.workloads import (
    CHAT,
    WORKLOADS,
    Lengths,
    arrival_times,
    find_workload,
    make_requests,
    with_known_classes,
)
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, ClassSet, single_stage


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_seed_fixes_every_byte(name: str) -> None:
    def made(seed: int) -> list[object]:
        rng = np.random.default_rng(seed)
        return list(make_requests(find_workload(name), arrival_times(rng, 2.0, 20.0), rng))

    assert made(3) == made(3)
    assert made(3) != made(4)


def test_request_ids_are_unique() -> None:
    rng = np.random.default_rng(0)
    requests = make_requests(find_workload("mixed"), arrival_times(rng, 5.0, 60.0), rng)
    assert len({request.request_id for request in requests}) == len(requests)


@pytest.mark.parametrize("make", [chat_question, coding_task, document_to_summarise, text_to_edit])
@pytest.mark.parametrize("words", [60, 200, 1000])
def test_prompts_are_about_as_long_as_asked(make: object, words: int) -> None:
    assert callable(make)
    for seed in range(5):
        text = make(np.random.default_rng(seed), words)
        assert 0.8 * words <= len(text.split()) <= 1.3 * words + 25


@given(words=st.integers(1, 400), seed=st.integers(0, 50))
def test_plain_text_is_exactly_as_long_as_asked(words: int, seed: int) -> None:
    assert len(plain_text(np.random.default_rng(seed), words).split()) == words


def test_prompts_leave_no_template_field_open() -> None:
    for seed in range(40):
        for make in (chat_question, document_to_summarise, text_to_edit):
            text = make(np.random.default_rng(seed), 150)
            assert "{" not in text and "}" not in text


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_stay_in_range(cv: float) -> None:
    times = arrival_times(np.random.default_rng(1), 50.0, 200.0, cv)
    assert np.all(np.diff(times) >= 0.0) and times[0] >= 0.0 and times[-1] < 200.0
    assert len(times) == pytest.approx(10_000, rel=0.1)
    assert np.std(np.diff(times)) * 50.0 == pytest.approx(cv, rel=0.2, abs=0.01)


@pytest.mark.parametrize(("rate", "duration", "cv"), [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, -1.0)])
def test_arrivals_refuse_nonsense(rate: float, duration: float, cv: float) -> None:
    with pytest.raises(InvalidFieldError):
        arrival_times(np.random.default_rng(0), rate, duration, cv)


@given(seed=st.integers(0, 200), scale=st.floats(0.01, 3.0))
def test_lengths_stay_in_their_range(seed: int, scale: float) -> None:
    drawn = Lengths(100, 1.0, 20, 300).draw(np.random.default_rng(seed), scale)
    assert max(1, round(20 * scale)) <= drawn <= round(300 * scale) + 1


def test_unknown_workload_names_the_known_ones() -> None:
    with pytest.raises(InvalidFieldError, match="mixed"):
        find_workload("nope")


def test_missing_class_takes_the_default_or_is_an_error() -> None:
    fast = ClassSet({"fast": single_stage("fast", SLO(ttft_ms=100.0))}, default="fast")
    assert [part.slo_class for part in with_known_classes((CHAT,), fast)] == ["fast"]
    with pytest.raises(InvalidFieldError, match="chat"):
        with_known_classes((CHAT,), replace(fast, default=None))
    unpromised = replace(CHAT, slo_class=None)
    assert with_known_classes((unpromised,), replace(fast, default=None)) == (unpromised,)
