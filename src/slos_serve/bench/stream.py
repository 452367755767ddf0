"""Reads an OpenAI event stream: bytes to events, events to token counts and times.

Decides how many tokens a chunk carried. Servers may put several tokens into one chunk, so chunks are not counted as
tokens when the server tells better: usage in every chunk (``continuous_usage_stats``) is exact; a usage total at the
end is spread evenly over the chunks that carried text; without any usage one chunk counts as one token.
"""

from __future__ import annotations

import json
from typing import Any

from slos_serve.bench.requests import Response

DONE = b"[DONE]"


class StreamError(Exception):
    """The stream holds something that is no answer: an error event, or no JSON."""


class EventSplitter:
    """Cuts a byte stream into the ``data`` payloads of its server-sent events.

    Follows the event-stream grammar as far as OpenAI servers use it: lines end in LF or CRLF, an empty line ends an
    event, several ``data`` lines of one event are joined, comments and other fields are skipped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Payloads of the events that ``received`` completes."""
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        events = []
        for ended_line in lines:
            line = ended_line.rstrip(b"\r")
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return events


class AnswerReader:
    """Fills a :class:`Response` from the events of its stream."""

    def __init__(self, response: Response, keep_text: bool = False) -> None:
        self._response = response
        self._keep_text = keep_text
        self._counted = 0
        self._exact = False
        self.done = False

    def read(self, payload: bytes, at_s: float) -> None:
        """Take one event that arrived at ``at_s``.

        Raises:
            StreamError: the event is an error or no JSON object.
        """
        if payload == DONE:
            self.done = True
            return
        event = _parse(payload)
        if "error" in event:
            raise StreamError(error_text(event))
        usage, choices = event.get("usage"), event.get("choices") or []
        carried = self._read_choices(choices)
        if usage:
            self._read_usage(usage, bool(choices), at_s)
        if carried and not self._exact:
            self._add_chunk(1, at_s)

    def finish(self) -> None:
        """Settle the token counts once the stream has ended."""
        response = self._response
        if not self._exact and response.output_tokens and response.chunk_times_s:
            response.chunk_tokens = spread(response.output_tokens, len(response.chunk_times_s))
        response.output_tokens = response.output_tokens or sum(response.chunk_tokens)

    def _read_choices(self, choices: list[dict[str, Any]]) -> bool:
        """True when any choice carried part of the answer."""
        carried = False
        for choice in choices:
            text = _text_of(choice)
            ids = choice.get("token_ids") or []
            carried = carried or bool(text or ids)
            self._response.token_ids.extend(ids)
            if self._keep_text:
                self._response.text += text
            if choice.get("finish_reason"):
                self._response.finish_reason = choice["finish_reason"]
        return carried

    def _read_usage(self, usage: dict[str, Any], beside_choices: bool, at_s: float) -> None:
        total = int(usage.get("completion_tokens") or 0)
        self._response.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        self._response.output_tokens = total
        # Usage in the first chunk is a running count; usage that first comes later is the total at the end.
        self._exact = self._exact or (beside_choices and not self._response.chunk_times_s)
        if self._exact and total > self._counted:
            self._add_chunk(total - self._counted, at_s)
            self._counted = total

    def _add_chunk(self, tokens: int, at_s: float) -> None:
        self._response.chunk_times_s.append(at_s)
        self._response.chunk_tokens.append(tokens)


def spread(tokens: int, chunks: int) -> list[int]:
    """Split ``tokens`` over ``chunks`` as evenly as whole numbers allow."""
    return [(i + 1) * tokens // chunks - i * tokens // chunks for i in range(chunks)]


def error_text(body: object) -> str:
    """The message of an OpenAI error body, or of whatever came in its place."""
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, dict):
            return str(error.get("message") or error)
        return str(error)
    return str(body)


def _parse(payload: bytes) -> dict[str, Any]:
    try:
        event = json.loads(payload)
    except ValueError as error:
        raise StreamError(f"no JSON in the stream: {payload[:80]!r}") from error
    if not isinstance(event, dict):
        raise StreamError(f"no JSON object in the stream: {payload[:80]!r}")
    return event


def _text_of(choice: dict[str, Any]) -> str:
    """Text of a completion chunk, or any part of a chat chunk: reasoning and tool calls are output too."""
    delta = choice.get("delta")
    if delta is None:
        return str(choice.get("text") or "")
    if delta.get("tool_calls"):
        return json.dumps(delta["tool_calls"])
    return str(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or "")
