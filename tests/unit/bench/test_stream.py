"""Event streams: cutting bytes into events, and events into token counts."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.bench.requests import BenchRequest, Response
from slos_serve.bench.stream import DONE, AnswerReader, EventSplitter, StreamError, error_text, spread
from tests.unit.bench.sse_server import chat_chunk, usage


def read_all(events: list[dict[str, Any]], keep_text: bool = True) -> Response:
    """The response to events that arrive a second apart, then [DONE]."""
    response = Response(BenchRequest("r", 0.0, "p", 16))
    reader = AnswerReader(response, keep_text)
    for second, event in enumerate(events):
        reader.read(json.dumps(event).encode(), float(second))
    reader.read(DONE, float(len(events)))
    reader.finish()
    assert reader.done
    return response


@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_events_do_not_depend_on_how_bytes_arrive(cuts: list[int]) -> None:
    stream = b": hello\r\nevent: x\r\ndata: one\r\n\r\ndata:two\n\ndata: a\ndata: b\n\nid: 3\n\n"
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    splitter = EventSplitter()
    got = [event for start, end in pairwise(edges) for event in splitter.feed(stream[start:end])]
    assert got == [b"one", b"two", b"a\nb"]


def test_running_usage_counts_several_tokens_in_a_chunk() -> None:
    response = read_all(
        [
            chat_chunk("") | usage(9, 0),
            chat_chunk("Hel") | usage(9, 1),
            chat_chunk("lo you") | usage(9, 4),
            chat_chunk("", "length") | usage(9, 5),
            {"choices": []} | usage(9, 5),
        ]
    )
    assert response.chunk_times_s == [1.0, 2.0, 3.0]
    assert response.chunk_tokens == [1, 3, 1]
    assert response.token_times_s.tolist() == [1.0, 2.0, 2.0, 2.0, 3.0]
    assert (response.prompt_tokens, response.output_tokens, response.finish_reason) == (9, 5, "length")
    assert response.text == "Hello you"


def test_usage_at_the_end_is_spread_over_the_chunks() -> None:
    events = [chat_chunk(""), chat_chunk("a"), chat_chunk("b"), chat_chunk("", "stop"), {"choices": []} | usage(9, 5)]
    response = read_all(events)
    assert response.chunk_times_s == [1.0, 2.0]
    assert sum(response.chunk_tokens) == response.output_tokens == 5


def test_usage_beside_the_last_chunk_is_a_total() -> None:
    response = read_all([chat_chunk("a"), chat_chunk("b"), chat_chunk("c", "stop") | usage(9, 3)])
    assert response.chunk_tokens == [1, 1, 1]


def test_without_usage_a_chunk_is_a_token() -> None:
    response = read_all([{"choices": [{"text": "a"}]}, {"choices": [{"text": "b", "finish_reason": "stop"}]}])
    assert (response.chunk_tokens, response.output_tokens, response.prompt_tokens) == ([1, 1], 2, 0)


def test_reasoning_and_tool_calls_are_output() -> None:
    events: list[dict[str, Any]] = [
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{}"}}]}}]},
    ]
    assert read_all(events).chunk_times_s == [0.0, 1.0]


def test_token_ids_are_kept_and_mark_a_chunk_without_text() -> None:
    response = read_all([{"choices": [{"text": "", "token_ids": [5, 6]}]}])
    assert response.token_ids == [5, 6]
    assert response.chunk_times_s == [0.0]


@pytest.mark.parametrize("payload", [b"not json", b"[1]", b'{"error": {"message": "engine died", "code": 500}}'])
def test_what_is_no_answer_is_an_error(payload: bytes) -> None:
    with pytest.raises(StreamError):
        AnswerReader(Response(BenchRequest("r", 0.0, "p", 16))).read(payload, 0.0)


@given(tokens=st.integers(0, 500), chunks=st.integers(1, 50))
def test_spread_keeps_the_sum_and_is_even(tokens: int, chunks: int) -> None:
    parts = spread(tokens, chunks)
    assert sum(parts) == tokens
    assert max(parts) - min(parts) <= 1


def test_error_text_finds_the_message() -> None:
    assert error_text({"error": {"message": "too long", "param": "prompt"}}) == "too long"
    assert error_text({"error": "plain"}) == "plain"
    assert error_text(["odd"]) == "['odd']"
