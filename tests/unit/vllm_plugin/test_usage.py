"""The usage at the end of streams."""

from __future__ import annotations

import json

from slos_serve.vllm_plugin.usage import with_usage


def test_only_the_chunk_with_the_final_usage_is_changed() -> None:
    usage = b'data: {"choices":[],"usage":{"completion_tokens":4}}'
    others = [b'data: {"choices":[{"text":"\\"usage\\":{"}],"usage":{"completion_tokens":1}}', b"data: [DONE]", b""]
    asked: list[int] = []

    def measured(tokens: int) -> dict[str, object]:
        asked.append(tokens)
        return {"class": "chat"}

    for event in others:
        assert with_usage(event, measured) is event
    changed = with_usage(b"\n\n".join([usage, *others]), measured).split(b"\n\n")
    assert changed[1:] == others and asked == [4]
    assert json.loads(changed[0].removeprefix(b"data: "))["usage"] == {"completion_tokens": 4, "slo": {"class": "chat"}}
    for broken in (b'data: {"choices":[],"usage":{}}', b'data: {"choices":[],"usage":{"completion_tokens":"x"}}'):
        assert with_usage(broken, measured) == broken
