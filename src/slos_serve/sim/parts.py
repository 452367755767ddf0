"""What of a call a replica serves, where one computes its prompt and another its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """A replica's part of a call; by default all of it. Times are virtual seconds.

    Attributes:
        prompt_only: another replica generates the answer.
        due_s: when such a prompt must be computed for the call's promise to be kept.
        is_promise: this replica's admission is a promise to the client; not for a prompt whose answer nobody has
            promised yet.
        tokens_done: prompt tokens whose KV comes from another replica.
        output_tokens: tokens of the answer that come from there.
        comes_s: when that KV is there; until then the call cannot run.
    """

    prompt_only: bool = False
    due_s: float = float("inf")
    is_promise: bool = True
    tokens_done: int = 0
    output_tokens: int = 0
    comes_s: float = 0.0


WHOLE = Part()
