"""KV memory that promises will need (design 4.3).

A request holds its prompt and what it has generated, and grows to prompt + forecast output. Best effort counts for
nothing here: it gives way.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.planning.batch import blocks_for
from slos_serve.planning.candidates import BEST_EFFORT, tokens_to_do
from slos_serve.planning.prefill_rate import FloatArray


@njit(cache=True)
def peak_blocks(rows: RequestArray, slot: int, block_size: int) -> int:
    """Blocks a request holds when its forecast last token comes."""
    tokens = rows["prompt_tokens"][slot] + max(rows["expected_tokens"][slot], rows["output_tokens"][slot])
    return blocks_for(tokens, block_size)


@njit(cache=True)
def reserve(
    rows: RequestArray, running: SlotArray, candidates: SlotArray, total_blocks: int, block_size: int
) -> tuple[FloatArray, FloatArray]:
    """Blocks each candidate will need, and what promised decodes leave of the cache.

    Returns:
        memory (float64 [n, 1]) and room (float64 [1]), in blocks.
    """
    room = np.empty(1)
    room[0] = total_blocks
    for slot in running:
        if rows["status"][slot] == BEST_EFFORT:
            continue
        if rows["output_tokens"][slot] > 0 and tokens_to_do(rows, slot) <= 1:
            room[0] -= peak_blocks(rows, slot, block_size)
    memory = np.empty((len(candidates), 1))
    for j in range(len(candidates)):
        memory[j, 0] = peak_blocks(rows, candidates[j], block_size)
    return memory, room
