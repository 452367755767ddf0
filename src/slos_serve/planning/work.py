"""What there is to run in a step: promised decodes, promised prompts, the rest; and what the decodes draft."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.batch_time import K_CTX, K_S, K_SEQ
from slos_serve.planning.batch import Limits, tokens_left
from slos_serve.planning.candidates import ADMITTED, next_due_s, tier_of, tokens_to_do
from slos_serve.planning.prefill_rate import FloatArray, IntArray, linear_step_s

# A verification may bring one token only. Decodes that draft are kept this many batches ahead of their due times, so
# that a few such in a row neither make them late nor cut batches short. A verification costs the same now or later.
LEAD_PERIODS = 4.0


class Work(NamedTuple):
    """What there is to run, each part in the order of its due times.

    Attributes:
        decodes, decode_due_s: promised decodes.
        prefills, prefill_due_s: promised prompts, running ones and those that admission serves.
        extras: running requests that only use what is left over, in the engine's order.
        shortest_s: shortest time between two tokens of a promised decode, margin taken off.
    """

    decodes: SlotArray
    decode_due_s: FloatArray
    prefills: SlotArray
    prefill_due_s: FloatArray
    extras: SlotArray
    shortest_s: float


class Drafts(NamedTuple):
    """What the promised decodes draft in this step.

    Attributes:
        lengths: int64 [decodes].
        longest_s: how long a step beside them may last; no bound without speculation.
        ahead_s: decodes due within this much of the end of the step are in it; the shortest pace without speculation.
        each_s: float64 [decodes], how long what a verification brings lasts on average; the shortest pace without
            speculation.
    """

    lengths: IntArray
    longest_s: float
    ahead_s: float
    each_s: FloatArray


@njit(cache=True)
def sort_out(rows: RequestArray, running: SlotArray, chosen: SlotArray, tpot_margin: float, turn: int) -> Work:
    """Tell promised decodes, promised prefills and the rest apart; ``turn`` is in none of them."""
    most = len(running) + len(chosen)
    decodes, decode_due_s = np.empty(most, dtype=np.int64), np.empty(most)
    prefills, prefill_due_s = np.empty(most, dtype=np.int64), np.empty(most)
    extras = np.empty(most, dtype=np.int64)
    num_decodes, num_prefills, num_extras = 0, 0, 0
    shortest_s = np.inf
    for slot in running:
        todo = tokens_to_do(rows, slot)
        if todo <= 0 or rows["output_tokens"][slot] >= rows["max_tokens"][slot]:
            continue  # its last token is in flight
        if slot == turn:
            continue
        if rows["status"][slot] != ADMITTED:
            extras[num_extras] = slot
            num_extras += 1
        elif rows["output_tokens"][slot] > 0 and todo <= 1:
            decodes[num_decodes] = slot
            decode_due_s[num_decodes] = next_due_s(rows, slot, tpot_margin)
            shortest_s = min(shortest_s, rows["tpot_s"][slot] * (1.0 - tpot_margin))
            num_decodes += 1
        else:
            prefills[num_prefills] = slot
            prefill_due_s[num_prefills] = next_due_s(rows, slot, tpot_margin)
            num_prefills += 1
    for slot in chosen:
        if slot == turn:
            continue
        prefills[num_prefills] = slot
        prefill_due_s[num_prefills] = next_due_s(rows, slot, tpot_margin)
        num_prefills += 1
    first = np.argsort(decode_due_s[:num_decodes], kind="mergesort")
    second = np.argsort(prefill_due_s[:num_prefills], kind="mergesort")
    return Work(
        decodes[:num_decodes][first],
        decode_due_s[:num_decodes][first],
        prefills[:num_prefills][second],
        prefill_due_s[:num_prefills][second],
        extras[:num_extras],
        shortest_s,
    )


@njit(cache=True)
def draft_of(rows: RequestArray, slot: int, tier_tpot_s: FloatArray, tier_drafts: IntArray) -> int:
    """Draft length of a decode: its tier's, as far as it has drafts and may still generate tokens."""
    if len(tier_drafts) == 0:
        return 0
    left = min(rows["max_tokens"][slot] - rows["output_tokens"][slot] - 1, rows["draft_limit"][slot])
    return int(max(min(tier_drafts[tier_of(tier_tpot_s, rows["tpot_s"][slot])], left), 0))


@njit(cache=True)
def drafts_of(
    rows: RequestArray,
    work: Work,
    tpot_margin: float,
    tier_tpot_s: FloatArray,
    tier_drafts: IntArray,
    tier_longer: FloatArray,
    tier_yields: FloatArray,
) -> Drafts:
    """Look up every promised decode's tier. When none drafts anything the step is as without speculation."""
    count = len(work.decodes)
    lengths, each_s = np.zeros(count, dtype=np.int64), np.full(count, work.shortest_s)
    if len(tier_drafts) == 0:
        return Drafts(lengths, np.inf, work.shortest_s, each_s)
    longest_s = np.inf
    for j in range(count):
        slot = work.decodes[j]
        level = tier_of(tier_tpot_s, rows["tpot_s"][slot])
        lengths[j] = draft_of(rows, slot, tier_tpot_s, tier_drafts)
        pace_s = rows["tpot_s"][slot] * (1.0 - tpot_margin)
        longest_s = min(longest_s, pace_s * tier_longer[level])
        each_s[j] = pace_s * tier_yields[level]
    if not lengths.any():
        return Drafts(lengths, np.inf, work.shortest_s, each_s)
    return Drafts(lengths, longest_s, LEAD_PERIODS * longest_s, each_s)


@njit(cache=True)
def anyone_prefills(rows: RequestArray, extras: SlotArray) -> bool:
    """Whether one of them has more to compute than its next token."""
    found = False
    for slot in extras:
        found = found or rows["output_tokens"][slot] == 0 or tokens_left(rows, slot) > 1
    return found


@njit(cache=True)
def cap_drafts(
    rows: RequestArray, work: Work, drafts: Drafts, due_until_s: float, limit_s: float, limits: Limits
) -> None:
    """Shorten drafts to the longest with which the decodes due by ``due_until_s`` end within ``limit_s``; 0 at least.

    They also leave every one of these decodes a token of the step.
    """
    coefficients = limits.coefficients
    fixed_s, count, longest = 0.0, 0, 0
    for j in range(len(work.decodes)):
        if work.decode_due_s[j] <= due_until_s:
            fixed_s += coefficients[K_CTX] * rows["computed_tokens"][work.decodes[j]]
            longest = max(longest, drafts.lengths[j])
            count += 1
    cap = longest
    while cap > 0:
        tokens = 0.0
        for j in range(len(work.decodes)):
            if work.decode_due_s[j] <= due_until_s:
                tokens += 1.0 + min(drafts.lengths[j], cap)
        step_s = linear_step_s(coefficients, tokens) + fixed_s + coefficients[K_SEQ] * tokens + coefficients[K_S] * cap
        if step_s <= limit_s and tokens <= limits.max_tokens:
            break
        cap -= 1
    if cap < longest:
        for j in range(len(work.decodes)):
            drafts.lengths[j] = min(drafts.lengths[j], cap)
