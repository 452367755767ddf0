"""Requests that a server on the open network gets sooner or later: malformed, absurd, or cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

MODEL = "smollm2"
TOO_MANY_TOKENS = 4097
REFUSED = (400, 404, 413, 415, 422)
EITHER = (200, *REFUSED)
JSON_HEADERS = {"content-type": "application/json"}
WRONG: tuple[object, ...] = (
    None, True, False, [], [1, 2], {}, {"a": 1}, "", "fast", "\u0000", "9" * 5000, "x" * 100_000,
    -1, 0, -0.5, -1e-320, 1e308, 10**30, -(10**30), float("nan"), float("inf"),
)  # fmt: skip


@dataclass(frozen=True)
class Hostile:
    """One request and which statuses are right; ``cut`` says where the client hangs up instead of reading an answer."""

    kind: str
    body: bytes
    headers: dict[str, str]
    statuses: tuple[int, ...]
    route: str = "completions"
    cut: str = ""


def _bytes(document: object) -> bytes:
    return json.dumps(document).encode()


def _plain(**fields: object) -> bytes:
    return _bytes({"model": MODEL, "prompt": "Hi", "max_tokens": 2, **fields})


def _asking(slo_class: str) -> dict[str, str]:
    return {**JSON_HEADERS, "x-slo-class": slo_class}


def _bad_field(dice: Random) -> Hostile:
    key = dice.choice(["slo_class", "slo_ttft_ms", "slo_tpot_ms", "slo_expected_tokens"])
    return Hostile("bad field", _plain(vllm_xargs={key: dice.choice(WRONG)}), JSON_HEADERS, REFUSED)


def _bad_header(dice: Random) -> Hostile:
    name = dice.choice(["x-slo-ttft-ms", "x-slo-tpot-ms", "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"])
    value = dice.choice(["", "-5", "0", "1e3", "nan", "inf", "0x10", "9" * 400, "five", "5,5", "\xff"])
    return Hostile("bad header", _plain(), {**JSON_HEADERS, name: value}, REFUSED)


def _unknown_class(dice: Random) -> Hostile:
    name = dice.choice(["gold", "CHAT", "../chat", "chat?", "*", "x" * 200])
    if dice.random() < 0.5:
        return Hostile("unknown class", _plain(), _asking(name), REFUSED)
    return Hostile("unknown class", _plain(vllm_xargs={"slo_class": name}), JSON_HEADERS, REFUSED)


def _unknown_key(dice: Random) -> Hostile:
    key = "slo_" + dice.choice(["tpot", "", "x" * 500])
    return Hostile("unknown key", _plain(vllm_xargs={key: 5}), JSON_HEADERS, REFUSED)


def _bad_xargs(dice: Random) -> Hostile:
    given = dice.choice([[], "slo_class", 5, {"slo_class": {"slo_class": "chat"}}, {"a": {"b": {}}}])
    return Hostile("bad xargs", _plain(vllm_xargs=given), _asking("chat"), REFUSED)


def _no_json(dice: Random) -> Hostile:
    bodies = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 20_000,
        b'{"slo_": }',
        b'"' + b"a" * 9_000,
    ]
    return Hostile("no json", dice.choice(bodies), _asking("chat"), REFUSED)


def _content_type(dice: Random) -> Hostile:
    kind = dice.choice(["text/plain", "multipart/form-data", "\xff"])
    return Hostile("content type", _plain(), {"content-type": kind, "x-slo-class": "chat"}, REFUSED)


def _bad_sampling(dice: Random) -> Hostile:
    key = dice.choice(
        [
            "max_tokens",
            "temperature",
            "top_p",
            "n",
            "stream",
            "stop",
            "logprobs",
            "seed",
        ]
    )
    value = dice.choice(["many", -7, [[]], {"a": 1}, 10**30, float("nan")])
    return Hostile("bad sampling", _plain(**{key: value}), _asking("code"), EITHER)


def _empty_prompt(dice: Random) -> Hostile:
    prompts: list[object] = ["", [], [[]], None, " "]
    return Hostile("empty prompt", _plain(prompt=dice.choice(prompts)), _asking("code"), EITHER)


def _empty_chat(dice: Random) -> Hostile:
    messages: object = dice.choice([[], None, [{}], [{"role": "user"}], "hi"])
    body = _bytes({"model": MODEL, "messages": messages, "max_tokens": 2})
    return Hostile("empty chat", body, _asking("code"), EITHER, "chat/completions")


def _too_long(dice: Random) -> Hostile:
    prompts: list[object] = [[5] * TOO_MANY_TOKENS, [5] * 100_000, "word " * 50_000]
    return Hostile("too long", _plain(prompt=dice.choice(prompts)), _asking("chat"), REFUSED)


def _bad_token(dice: Random) -> Hostile:
    return Hostile(
        "bad token",
        _plain(prompt=[dice.choice([-1, 10**9, 2**63, 10**30])]),
        _asking("chat"),
        REFUSED,
    )


def _cut(dice: Random, where: str) -> Hostile:
    prompt = "Tell a story. " * dice.randint(1, 60)
    body = _plain(stream=True, max_tokens=400, ignore_eos=True, prompt=prompt)
    return Hostile(
        f"cut {where}",
        body,
        _asking(dice.choice(["chat", "code", "batch"])),
        (200,),
        cut=where,
    )


def _extreme(dice: Random) -> Hostile:
    xargs = {
        "slo_ttft_ms": dice.choice([1e-9, 1, 86_400_000]),
        "slo_expected_tokens": 10_000_000,
    }
    return Hostile(
        "extreme",
        _plain(vllm_xargs=xargs),
        {**JSON_HEADERS, "x-session-id": "s" * 256},
        (200,),
    )


_MAKERS: tuple[tuple[Callable[[Random], Hostile], int], ...] = (
    (_bad_field, 3), (_bad_header, 2), (_unknown_class, 1), (_unknown_key, 1), (_bad_xargs, 1), (_no_json, 2),
    (_content_type, 1), (_bad_sampling, 2), (_empty_prompt, 1), (_empty_chat, 1), (_too_long, 1), (_bad_token, 1),
    (lambda dice: _cut(dice, "stream"), 3), (lambda dice: _cut(dice, "body"), 1), (_extreme, 1),
)  # fmt: skip


def hostile_requests(count: int, seed: int) -> list[Hostile]:
    """``count`` requests of all kinds in mixed order, the same for a seed."""
    dice = Random(seed)
    makers = [maker for maker, share in _MAKERS for _ in range(share)]
    cases = [makers[index % len(makers)](dice) for index in range(count)]
    dice.shuffle(cases)
    return cases
