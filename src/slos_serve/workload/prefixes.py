"""Which prompts begin alike: a tree of contents, laid out in arrays.

A *node* is a stretch of tokens that one or more calls have at the same place after the same beginning. The path of a
call is the nodes that its prompt begins with. Every call has a node of its own too: the rest of its prompt and its
answer, from where its path ends. The next round of a session, or the next turn of a conversation, has that node in its
path. What is shared is known before anything runs; whether it is still cached when it is needed is the engine's affair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Prefixes:
    """Paths of all calls. Node ``num_shared + call`` is the call's own.

    Attributes:
        path_start: int64 [calls + 1], where each call's path begins in ``path_node``.
        path_node: int64, nodes of all paths, first nodes first; own nodes of the call itself left out.
        begin, end: int64 [nodes], tokens before and up to the end of each node.
        num_shared: nodes that are nobody's own.
    """

    path_start: IntArray
    path_node: IntArray
    begin: IntArray
    end: IntArray
    num_shared: int

    def path(self, call: int) -> IntArray:
        """Nodes that a call's prompt begins with."""
        return self.path_node[self.path_start[call] : self.path_start[call + 1]]


def prefixes_of_sessions(calls: NDArray[np.void]) -> Prefixes:
    """Rounds of a session: each prompt begins with the prompt and the answer of the round before."""
    before = np.full(len(calls), -1, dtype=np.int64)
    linked = np.flatnonzero(calls["next_call"] >= 0)
    before[calls["next_call"][linked]] = linked
    return prefixes_of_turns(calls["prompt_tokens"], calls["output_tokens"], before)


def prefixes_of_turns(prompts: IntArray, outputs: IntArray, before: IntArray, common_tokens: int = 0) -> Prefixes:
    """Turns of conversations: ``before`` [calls] is the turn that a prompt continues, an earlier call, or -1.

    A prompt that is shorter than what it would continue begins with nothing. ``common_tokens``: a beginning that the
    first turns of all conversations share, a system prompt.
    """
    count, shared = len(prompts), 1 if common_tokens else 0
    begin, end = np.zeros(shared + count, dtype=np.int64), np.zeros(shared + count, dtype=np.int64)
    end[:shared] = common_tokens
    paths: list[list[int]] = []
    for call in range(count):
        own, earlier = shared + call, int(before[call])
        path = [0] if shared and prompts[call] > common_tokens else []
        if earlier >= 0 and prompts[call] > end[shared + earlier]:
            path = [*paths[earlier], shared + earlier]
        begin[own] = end[path[-1]] if path else 0
        end[own] = prompts[call] + outputs[call] - 1  # the last token of an answer is never computed
        paths.append(path)
    return _laid_out(paths, begin, end, shared)


def prefixes_of_blocks(
    prompts: IntArray, outputs: IntArray, blocks: Sequence[Sequence[int]], block_tokens: int
) -> Prefixes:
    """Recorded hashes of each prompt's blocks; equal hashes mean equal beginnings up to there (Mooncake)."""
    uses = Counter(item for row in blocks for item in set(row))
    nodes: dict[int, int] = {}
    spans: list[tuple[int, int]] = []
    paths: list[list[int]] = []
    for row in blocks:
        path: list[int] = []
        first = 0
        for place, item in enumerate(row):
            if uses[item] < 2:
                break
            if place + 1 < len(row) and uses[row[place + 1]] == uses[item]:
                continue  # the same calls go on: one node
            if item not in nodes:
                nodes[item] = len(spans)
                spans.append((first * block_tokens, (place + 1) * block_tokens))
            path.append(nodes[item])
            first = place + 1
        paths.append(path)
    shared, count = len(spans), len(prompts)
    begin, end = np.zeros(shared + count, dtype=np.int64), np.zeros(shared + count, dtype=np.int64)
    if spans:
        begin[:shared], end[:shared] = np.array(spans, dtype=np.int64).T
    for call, path in enumerate(paths):
        while path and end[path[-1]] >= prompts[call]:
            path.pop()  # a last block that is not whole belongs to the call alone
        begin[shared + call] = end[path[-1]] if path else 0
        end[shared + call] = prompts[call] + outputs[call] - 1
    return _laid_out(paths, begin, end, shared)


def cached_at_best(prefixes: Prefixes, prompts: IntArray, block_size: int) -> IntArray:
    """int64 [calls]: prompt tokens that a cache of any size would supply when calls run one after the other."""
    seen = np.zeros(len(prefixes.begin), dtype=np.bool_)
    cached = np.zeros(len(prompts), dtype=np.int64)
    for call in range(len(prompts)):
        for node in prefixes.path(call):
            if not seen[node]:
                break
            cached[call] = prefixes.end[node]
        cached[call] = min(cached[call], prompts[call] - 1) // block_size * block_size
        seen[prefixes.path(call)] = True
        seen[prefixes.num_shared + call] = True
    return cached


def _laid_out(paths: Sequence[Sequence[int]], begin: IntArray, end: IntArray, num_shared: int) -> Prefixes:
    lengths = np.array([len(path) for path in paths], dtype=np.int64)
    start = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths)))
    return Prefixes(start, np.array([node for path in paths for node in path], dtype=np.int64), begin, end, num_shared)
