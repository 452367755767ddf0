"""Conversations over long documents, of which a part is always the same: lengths and sharing near Mooncake's trace.

The conversation trace that Mooncake published (FAST 2025; 12,031 requests in an hour) has prompts of 12,035 tokens on
average and 343 tokens of answer, and a cache of any size would supply 40 % of the prompt tokens. The draw here has
these three figures (tested within 5 %) and prompts from 1,000 to 128,000 tokens: a conversation begins with a document
of log-normal length behind a common beginning; a later turn continues a recent one with its answer and a question.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from slos_serve.workload.prefixes import Prefixes, prefixes_of_turns

SHORTEST_PROMPT, LONGEST_PROMPT = 1_000, 128_000
COMMON_TOKENS = 512
# Mean tokens and spread of the logarithm.
DOCUMENT, QUESTION, ANSWER = (11_650.0, 1.0), (600.0, 1.3), (346.0, 0.8)
CONTINUES = 0.37
RECENT = 40  # conversations that a turn may continue; the newest are likelier
MOST_ANSWER = 2_048


def first_turns(count: int, random: Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompts as if every turn began a conversation, and answers; int64 [count] each."""
    prompts = np.clip(_draw(random, *DOCUMENT, count), SHORTEST_PROMPT, LONGEST_PROMPT)
    return prompts, np.clip(_draw(random, *ANSWER, count), 1, MOST_ANSWER)


def continue_turns(calls: NDArray[np.void], random: Generator) -> Prefixes:
    """Let some turns continue earlier ones: changes their prompts, and tells which prompts begin alike."""
    prompts, outputs = calls["prompt_tokens"], calls["output_tokens"]
    count = len(calls)
    before = np.full(count, -1, dtype=np.int64)
    questions = np.maximum(_draw(random, *QUESTION, count), 16)
    continues = random.random(count) < CONTINUES
    newness = random.random(count)
    open_turns: list[int] = []
    for call in range(count):
        if continues[call] and open_turns:
            place = int(len(open_turns) * np.sqrt(newness[call]))
            earlier = open_turns[place]
            longer = int(prompts[earlier] + outputs[earlier] + questions[call])
            if longer <= LONGEST_PROMPT:
                prompts[call] = longer
                before[call] = earlier
                del open_turns[place]
        open_turns.append(call)
        del open_turns[:-RECENT]
    return prefixes_of_turns(prompts, outputs, before, COMMON_TOKENS)


def _draw(random: Generator, mean: float, sigma: float, count: int) -> NDArray[np.int64]:
    drawn = random.lognormal(np.log(mean) - 0.5 * sigma * sigma, sigma, count)
    return np.rint(drawn).astype(np.int64)
