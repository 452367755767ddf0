"""vLLM's prefix cache on the arrays of one replica: which blocks are kept, who uses them, which go first.

A block of a context is known by all tokens up to its end, so blocks belong to nodes of
:mod:`slos_serve.workload.prefixes`. A running request holds the cached blocks that it found by reference and the rest
by itself; a shared node that it has computed to the end becomes cached at once, everything else when it leaves. Blocks
that nobody uses stay until their room is needed, least recently used first and of one request the last block first, as
in vLLM's queue of free blocks.

Left out: two requests that compute the same node at the same time both pay, and the copy of the second is dropped when
it leaves, where vLLM queues it behind the first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slos_serve.perf.jit import in_place
from slos_serve.workload.prefixes import Prefixes

IntArray = NDArray[np.int64]

# Entries of BlockCache.counts: cached blocks that nobody uses, ends of the queue, and whether anything is kept at all.
UNUSED, HEAD, TAIL, ENABLED = range(4)
# Waiting requests that are looked up before each plan, as the vLLM plug-in bounds its look-ups.
LOOK_UPS = 24
_SMALLEST_QUEUE = 4096


class BlockCache(NamedTuple):
    """State of one replica's cache; the first four never change.

    Attributes:
        path_start, path_node, begin, end: of :class:`Prefixes`; nodes that are nobody's own come first.
        users: int64 [nodes], running requests that hold a node by reference.
        blocks: int64 [nodes], blocks of it that are cached, from its beginning.
        freed: int64 [nodes], its newest place in the queue.
        queue: int64, nodes in the order in which they were freed; places count up for ever and wrap round.
        counts: int64 [4].
    """

    path_start: IntArray
    path_node: IntArray
    begin: IntArray
    end: IntArray
    users: IntArray
    blocks: IntArray
    freed: IntArray
    queue: IntArray
    counts: IntArray


def empty_cache(prefixes: Prefixes, enabled: bool) -> BlockCache:
    """A cache that holds nothing."""
    nodes = len(prefixes.begin)
    counts = np.zeros(4, dtype=np.int64)
    counts[ENABLED] = enabled
    return BlockCache(
        prefixes.path_start,
        prefixes.path_node,
        prefixes.begin,
        prefixes.end,
        np.zeros(nodes, dtype=np.int64),
        np.zeros(nodes, dtype=np.int64),
        np.zeros(nodes, dtype=np.int64),
        np.zeros(_SMALLEST_QUEUE, dtype=np.int64),
        counts,
    )


@in_place
def node_of(cache: BlockCache, call: int, place: int) -> int:
    """The node at a place of a call's path; its own comes after the last."""
    first, last = cache.path_start[call], cache.path_start[call + 1]
    if first + place < last:
        return int(cache.path_node[first + place])
    return len(cache.begin) - (len(cache.path_start) - 1) + call


@in_place
def path_length(cache: BlockCache, call: int) -> int:
    """Nodes before the call's own."""
    return int(cache.path_start[call + 1] - cache.path_start[call])


@in_place
def blocks_up_to(cache: BlockCache, node: int, tokens: int, block_size: int) -> int:
    """Whole blocks of a node when ``tokens`` of the context are there."""
    return int(max(min(cache.end[node], tokens) // block_size - cache.begin[node] // block_size, 0))


@in_place
def look_up(cache: BlockCache, call: int, most_tokens: int, block_size: int) -> tuple[int, int, int]:
    """Cached tokens at the beginning of a call's context, at most ``most_tokens`` (rounded down to blocks).

    Returns:
        The tokens, the nodes that they lie in, and how many of their blocks nobody uses now.
    """
    tokens, nodes, unused = 0, 0, 0
    if cache.counts[ENABLED] == 0:
        return 0, 0, 0
    most_tokens = most_tokens // block_size * block_size
    for place in range(path_length(cache, call) + 1):
        node = node_of(cache, call, place)
        have = cache.blocks[node]
        whole = blocks_up_to(cache, node, cache.end[node], block_size)
        if tokens >= most_tokens or (have == 0 and whole > 0):
            break
        if have > 0:
            tokens = min((cache.begin[node] // block_size + have) * block_size, most_tokens)
        if cache.users[node] == 0:
            unused += have
        nodes = place + 1
        if have < whole:
            break
    if tokens == 0:
        return 0, 0, 0
    return int(tokens), nodes, int(unused)


@in_place
def take(cache: BlockCache, call: int, nodes: int) -> None:
    """A request starts on the first ``nodes`` of its path."""
    for place in range(nodes):
        node = node_of(cache, call, place)
        if cache.users[node] == 0:
            cache.counts[UNUSED] -= cache.blocks[node]
        cache.users[node] += 1


@in_place
def referred_blocks(cache: BlockCache, call: int, nodes: int, block_size: int) -> int:
    """Blocks that a request holds by reference with the first ``nodes`` of its path."""
    if nodes == 0:
        return 0
    last = node_of(cache, call, nodes - 1)
    return int(cache.begin[last] // block_size + cache.blocks[last])


@in_place
def keep_computed(cache: BlockCache, call: int, nodes: int, tokens: int, block_size: int) -> int:
    """Cache the shared nodes that a running request has computed to their end; returns those it holds by reference now.

    Args:
        nodes: of its path that it holds by reference already; of the last one a part may be missing.
        tokens: of its context that are computed.
    """
    if cache.counts[ENABLED] == 0:
        return nodes
    if nodes > 0:
        last = node_of(cache, call, nodes - 1)
        whole = blocks_up_to(cache, last, cache.end[last], block_size)
        if cache.blocks[last] < whole:
            if cache.users[last] > 1 or cache.end[last] > tokens:
                return nodes
            cache.blocks[last] = whole
    while nodes < path_length(cache, call):
        node = node_of(cache, call, nodes)
        if cache.end[node] > tokens or cache.users[node] > 0:
            break
        cache.counts[UNUSED] -= cache.blocks[node]
        cache.blocks[node] = blocks_up_to(cache, node, tokens, block_size)
        cache.users[node] = 1
        nodes += 1
    return nodes


@in_place
def leave(cache: BlockCache, call: int, nodes: int, tokens: int, block_size: int) -> int:
    """A request gives its context of ``tokens`` up; what nobody else uses stays cached, its last blocks to go first.

    Returns:
        Blocks of the nodes that it held by reference and that nobody uses any more.
    """
    given = 0
    if cache.counts[ENABLED] == 0:
        return given
    for place in range(path_length(cache, call), -1, -1):
        node = node_of(cache, call, place)
        if place < nodes:
            cache.users[node] -= 1
            if cache.users[node] > 0:
                continue
            given += cache.blocks[node]
            cache.counts[UNUSED] += cache.blocks[node]
        elif cache.users[node] > 0:
            continue
        computed = blocks_up_to(cache, node, tokens, block_size)
        if computed > cache.blocks[node]:
            cache.counts[UNUSED] += computed - cache.blocks[node]
            cache.blocks[node] = computed
        if cache.blocks[node] > 0:
            tail = cache.counts[TAIL]
            cache.queue[tail % len(cache.queue)] = node
            cache.freed[node] = tail
            cache.counts[TAIL] = tail + 1
    return int(given)


@in_place
def evict(cache: BlockCache, room_blocks: int) -> None:
    """Forget blocks that nobody uses until at most ``room_blocks`` of them are left."""
    excess = cache.counts[UNUSED] - room_blocks
    while excess > 0 and cache.counts[HEAD] < cache.counts[TAIL]:
        place = cache.counts[HEAD]
        node = cache.queue[place % len(cache.queue)]
        if cache.users[node] > 0 or cache.freed[node] != place or cache.blocks[node] == 0:
            cache.counts[HEAD] += 1
            continue
        gone = min(excess, cache.blocks[node])
        cache.blocks[node] -= gone
        cache.counts[UNUSED] -= gone
        excess -= gone


def with_room(cache: BlockCache, entries: int) -> BlockCache:
    """The cache with room for so many more entries in its queue; entries that count no more are dropped."""
    head, tail = int(cache.counts[HEAD]), int(cache.counts[TAIL])
    if tail - head + entries <= len(cache.queue):
        return cache
    places = np.arange(head, tail)
    nodes = cache.queue[places % len(cache.queue)]
    live = (cache.users[nodes] == 0) & (cache.freed[nodes] == places) & (cache.blocks[nodes] > 0)
    nodes = nodes[live]
    queue = np.zeros(max(2 * (len(nodes) + entries), _SMALLEST_QUEUE), dtype=np.int64)
    queue[: len(nodes)] = nodes
    cache.freed[nodes] = np.arange(len(nodes))
    cache.counts[HEAD], cache.counts[TAIL] = 0, len(nodes)
    return cache._replace(queue=queue)
